"""The wire ops in plain torch: what the other bodies must equal, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from .checksum import crc32c

SMALLEST_MAXIMUM = 127 * 2.0**-126  # of a row in int8; below it the scale would be subnormal, and zeros are sent
EXPONENT = {1: (torch.int32, 0x7F800000), 2: (torch.int16, 0x7F80), 3: (torch.int16, 0x7C00)}  # by kind of range


def wire_pack_(data: Tensor, table: Tensor, values: Tensor, scales: Tensor) -> None:
    """Into ``values`` the values of ``data`` in its dtype; int8: by row, scale = max|row| / 127 into ``scales``."""
    for start, at, first, rows, length in table.tolist():
        lines, stop = data[start : start + rows * length].view(rows, length), at + rows * length
        if values.dtype == torch.int8:
            most = lines.abs().amax(1) if length else lines.new_zeros(rows)
            steps = torch.full_like(most, 127)  # a tensor: division by a number may multiply by 1/number
            zero = most < SMALLEST_MAXIMUM
            scales[first : first + rows] = torch.where(zero, 0.0, most / steps)
            lines = (lines * torch.where(zero, 0.0, steps / most)[:, None]).round()
        values[at:stop] = lines.flatten().to(values.dtype)


def _decoded(values: Tensor, scales: Tensor, at: int, first: int, rows: int, length: int) -> Tensor:
    line = values[at : at + rows * length].float()
    if values.dtype != torch.int8:
        return line
    return (line.view(rows, length) * scales[first : first + rows, None]).flatten()


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
