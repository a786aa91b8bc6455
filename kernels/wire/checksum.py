"""CRC32C (Castagnoli, polynomial 0x1EDC6F41, reflected) in plain torch: wire_digest for the wire's reference."""

from __future__ import annotations

import torch
from torch import Tensor

# by kind of range: its floats' bits, and those of the first magnitude that is too large; 4: scales, below 2^121
LIMITS = {
    1: (torch.int32, 0x7F800000),
    2: (torch.int16, 0x7F80),
    3: (torch.int16, 0x7C00),
    4: (torch.int32, 0x7C000000),
}


def crc32c(part: Tensor) -> int:
    """CRC32C of uint8 (n,) by a tree: it is linear, so crc(a b) = crc(a followed by |b| zero bytes) xor crc(b)."""
    head = part[:4].long() ^ 255  # the register's start value is the same as the first four bytes inverted
    crc, byte = torch.cat([head, part[4:].long()]), torch.arange(256)
    for _ in range(8):
        byte = (byte >> 1) ^ ((byte & 1) * 0x82F63B78)
    crc = byte[crc]
    zeros = torch.stack([byte, *((torch.arange(256) << 8 * j) for j in range(3))])  # followed by one zero byte
    while len(crc) > 1:
        crc = torch.cat([crc.new_zeros(len(crc) % 2), crc]).view(-1, 2)
        crc = _mapped(zeros, crc[:, 0]) ^ crc[:, 1]
        zeros = _mapped(zeros, zeros)
    unmet = 0xFFFFFFFF >> 8 * len(head)  # what of the start value met no byte is still there
    return int(crc.sum()) ^ 0xFFFFFFFF ^ unmet


def _mapped(table: Tensor, crc: Tensor) -> Tensor:
    return table[0][crc & 255] ^ table[1][crc >> 8 & 255] ^ table[2][crc >> 16 & 255] ^ table[3][crc >> 24 & 255]


def wire_digest(buffer: Tensor, ranges: Tensor) -> Tensor:
    """int64 (n, 2): CRC32C of buffer[start:stop], and whether a float in it is infinite, NaN, or a scale too large."""
    found = []
    for start, stop, kind in ranges.tolist():
        part, finite = buffer[start:stop], True
        if kind:
            dtype, limit = LIMITS[kind]
            finite = bool((part.view(dtype) & torch.iinfo(dtype).max < limit).all())
        found.append((crc32c(part), int(not finite)))
    return torch.tensor(found, dtype=torch.int64).view(-1, 2)
