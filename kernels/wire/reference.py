"""The wire ops in plain torch: what the other bodies must equal, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_MAXIMUM = 127 * 2.0**-126  # of a row in int8; below it the scale would be subnormal, and zeros are sent
EXPONENT = {1: (torch.int32, 0x7F800000), 2: (torch.int16, 0x7F80), 3: (torch.int16, 0x7C00)}  # by kind of range


def wire_pack_(data: Tensor, table: Tensor, values: Tensor, scales: Tensor) -> None:
    """Into ``values`` the values of ``data`` in its dtype; int8: by row, scale = max|row| / 127 into ``scales``."""
    for start, at, first, rows, length in table.tolist():
        lines, stop = data[start : start + rows * length].view(rows, length), at + rows * length
        if values.dtype == torch.int8:
            most = lines.abs().amax(1) if length else lines.new_zeros(rows)
            steps, zero = (
                torch.full_like(most, 127),
                most < SMALLEST_MAXIMUM,
            )  # division by a number may multiply by 1/number
            scales[first : first + rows] = torch.where(zero, 0.0, most / steps)
            lines = (lines * torch.where(zero, 0.0, steps / most)[:, None]).round()
        values[at:stop] = lines.flatten().to(values.dtype)


def _decoded(values: Tensor, scales: Tensor, at: int, first: int, rows: int, length: int) -> Tensor:
    line = values[at : at + rows * length].float()
    return (
        line if values.dtype != torch.int8 else (line.view(rows, length) * scales[first : first + rows, None]).flatten()
    )


def wire_unpack_(values: Tensor, scales: Tensor, table: Tensor, data: Tensor) -> None:
    """Into ``data`` the values of a message, float32."""
    for start, at, first, rows, length in table.tolist():
        data[start : start + rows * length] = _decoded(values, scales, at, first, rows, length)


def wire_accumulate_(sum: Tensor, values: Tensor, scales: Tensor, table: Tensor, weight: float) -> None:
    """sum += weight · value in float64, product and sum each rounded."""
    for _, at, first, rows, length in table.tolist():
        sum[at : at + rows * length] += _decoded(values, scales, at, first, rows, length).double() * weight


def wire_digest(buffer: Tensor, ranges: Tensor) -> Tensor:
    """int64 (n, 2): CRC32C of buffer[start:stop], and whether a float in it is infinite or NaN."""
    found = []
    for start, stop, kind in ranges.tolist():
        part, finite = buffer[start:stop], True
        if kind:
            dtype, exponent = EXPONENT[kind]
            finite = bool(((part.view(dtype) & exponent) != exponent).all())
        found.append((crc32c(part), int(not finite)))
    return torch.tensor(found, dtype=torch.int64).view(-1, 2)


def crc32c(part: Tensor) -> int:
    """CRC32C by a tree: the checksum is linear, so crc(a b) = crc(a followed by |b| zero bytes) xor crc(b)."""
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
    return (
        int(crc.sum()) ^ 0xFFFFFFFF ^ 0xFFFFFFFF >> 8 * len(head)
    )  # what of the start value met no byte is still there


def _mapped(table: Tensor, crc: Tensor) -> Tensor:
    return table[0][crc & 255] ^ table[1][crc >> 8 & 255] ^ table[2][crc >> 16 & 255] ^ table[3][crc >> 24 & 255]
