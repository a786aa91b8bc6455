"""The wire ops in plain torch: what the other bodies must equal, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checksum import wire_digest

__all__ = ["wire_accumulate_", "wire_digest", "wire_mean_", "wire_pack_", "wire_unpack_"]

LEVELS = {torch.int8: 127, torch.uint8: 7}  # uint8: two int4 a byte, the first in the low half


def wire_pack_(data: Tensor, table: Tensor, values: Tensor, scales: Tensor) -> None:
    """Into ``values`` the values of ``data`` in its dtype; integers: by row, scale = max|row| / levels into
    ``scales``."""
    for start, at, first, rows, length in table.tolist():
        lines, stop = data[start : start + rows * length].view(rows, length), at + rows * length
        if levels := LEVELS.get(values.dtype):
            most = lines.abs().amax(1) if length else lines.new_zeros(rows)
            steps = torch.full_like(most, levels)  # a tensor: division by a number may multiply by 1/number
            zero = most < levels * 2.0**-126  # below it the scale would be subnormal, and zeros are sent
            scales[first : first + rows] = torch.where(zero, 0.0, most / steps)
            lines = (lines * torch.where(zero, 0.0, steps / most)[:, None]).round()
        line = lines.flatten()
        if values.dtype == torch.uint8:
            low, high = pad(line.to(torch.int8), (0, len(line) % 2)).view(-1, 2).unbind(1)
            values[at // 2 : -(-stop // 2)] = (low & 15 | high << 4).view(torch.uint8)
        else:
            values[at:stop] = line.to(values.dtype)


def _decoded(values: Tensor, scales: Tensor, at: int, first: int, rows: int, length: int) -> Tensor:
    stop = at + rows * length
    if values.dtype == torch.uint8:
        both = values[at // 2 : -(-stop // 2)].view(torch.int8)
        line = torch.stack([both << 4 >> 4, both >> 4], 1).flatten()[: stop - at].float()
    else:
        line = values[at:stop].float()
    if values.dtype not in LEVELS:
        return line
    return (line.view(rows, length) * scales[first : first + rows, None]).flatten()


def wire_unpack_(values: Tensor, scales: Tensor, table: Tensor, data: Tensor) -> None:
    """Into ``data`` the values of a message, float32."""
    for start, at, first, rows, length in table.tolist():
        data[start : start + rows * length] = _decoded(values, scales, at, first, rows, length)


def wire_accumulate_(
    sum: Tensor, values: list[Tensor], scales: list[Tensor], table: Tensor, weights: list[float]
) -> None:
    """sum += weight · value in float64, product and sum each rounded, one message after the other."""
    for values_of, scales_of, weight in zip(values, scales, weights, strict=True):
        for start, at, first, rows, length in table.tolist():
            line = _decoded(values_of, scales_of, at, first, rows, length)
            sum[start : start + rows * length] += line.double() * weight


def wire_mean_(
    mean: Tensor,
    sum: Tensor,
    values: list[Tensor],
    scales: list[Tensor],
    table: Tensor,
    weights: list[float],
    total: float,
) -> None:
    """mean = (sum + Σ weight · value) / total; ``sum`` float64, empty: 0. Each operation in float64, the last one
    rounded to float32."""
    sums = sum.clone() if len(sum) else torch.zeros_like(mean, dtype=torch.float64)
    wire_accumulate_(sums, values, scales, table, weights)
    mean.copy_(sums / total)
