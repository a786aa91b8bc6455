"""The wire ops on CUDA: one launch an op, one program a line of the table. Meaning: reference.py.

Rounding is by integer operations and without fused multiply-add, so that a message packed on a GPU has the bytes of one
packed on a CPU.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values a step; a line of the table is about as long
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def wire_pack_(data: Tensor, table: Tensor, values: Tensor, scales: Tensor) -> None:
    """See :func:`fibecfed_kernels.wire.reference.wire_pack_`."""
    _launch(_pack, table, values, data, scales)


def wire_unpack_(values: Tensor, scales: Tensor, table: Tensor, data: Tensor) -> None:
    """See :func:`fibecfed_kernels.wire.reference.wire_unpack_`."""
    _launch(_unpack, table, values, data, scales)


def wire_accumulate_(sum: Tensor, values: Tensor, scales: Tensor, table: Tensor, weight: float) -> None:
    """See :func:`fibecfed_kernels.wire.reference.wire_accumulate_`."""
    bits = struct.unpack("<q", struct.pack("<d", weight))[0]  # a float argument of a kernel would be rounded to float32
    _launch(_accumulate, table, values, sum, scales, bits)


def _launch(kernel, table, values, other, scales, *scalars):
    if len(table):
        raw = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
        args = (table, raw, other, scales, *scalars, KINDS[values.dtype], BLOCK)
        with torch.cuda.device_of(table):
            kernel[(len(table),)](*args, enable_fp_fusion=False)


@triton.jit
def _line(table):
    at = table + tl.program_id(0).to(tl.int64) * 5
    rows, length = tl.load(at + 3).to(tl.int32), tl.load(at + 4).to(tl.int32)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), rows, length


@triton.jit
def _pack(table, values, data, scales, KIND: tl.constexpr, BLOCK: tl.constexpr):
    start, at, first, rows, length = _line(table)
    if KIND == 3:
        if length <= 128:  # short rows: many at a time
            _quantize(data + start, values + at, scales + first, rows, length, 32, BLOCK // 32)
        else:
            _quantize(data + start, values + at, scales + first, rows, length, 1, BLOCK)
    else:
        n = rows * length
        for step in range(0, n, BLOCK):
            i = step + tl.arange(0, BLOCK)
            x = tl.load(data + start + i, mask=i < n, other=0.0)
            if KIND == 1:
                bits = x.to(tl.uint32, bitcast=True)
                is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
                rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
                x = (tl.where(is_nan, bits | 0x400000, rounded) >> 16).to(tl.int16)
            elif KIND == 2:
                x = x.to(tl.float16)
            tl.store(values + at + i, x, mask=i < n)


@triton.jit
def _quantize(data, values, scales, rows, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    for row in range(0, rows, ROWS):
        r = row + tl.arange(0, ROWS)
        largest = tl.zeros([ROWS], tl.int32)  # magnitudes' bits: NaN is above infinity is above every number
        for column in range(0, length, COLUMNS):
            c = column + tl.arange(0, COLUMNS)
            inside = (r < rows)[:, None] & (c < length)[None, :]
            x = tl.load(data + r[:, None] * length + c[None, :], mask=inside, other=0.0)
            largest = tl.maximum(largest, tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
        most = largest.to(tl.float32, bitcast=True)
        zero = largest < 0x03FE0000  # 127 · 2^-126: the scale would be subnormal
        tl.store(scales + r, tl.where(zero, 0.0, tl.math.div_rn(most, 127.0)), mask=r < rows)
        inverse = tl.where(zero, 0.0, tl.math.div_rn(tl.full([ROWS], 127.0, tl.float32), tl.where(zero, 1.0, most)))
        for column in range(0, length, COLUMNS):
            c = column + tl.arange(0, COLUMNS)
            inside = (r < rows)[:, None] & (c < length)[None, :]
            i = r[:, None] * length + c[None, :]
            # round to nearest, ties to even: with 1.5 · 2^23 added the low byte is the two's complement of q
            q = (tl.load(data + i, mask=inside, other=0.0) * inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True)
            tl.store(values + i, q.to(tl.int8), mask=inside)


@triton.jit
def _decoded(values, scales, i, n, length, KIND: tl.constexpr):
    w = tl.load(values + i, mask=i < n, other=0)
    if KIND == 1:
        x = (w.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == 3:
        x = w.to(tl.float32) * tl.load(scales + i // length, mask=i < n, other=0.0)
    else:
        x = w.to(tl.float32)
    return x


@triton.jit
def _unpack(table, values, data, scales, KIND: tl.constexpr, BLOCK: tl.constexpr):
    start, at, first, rows, length = _line(table)
    n = rows * length
    for step in range(0, n, BLOCK):
        i = step + tl.arange(0, BLOCK)
        tl.store(data + start + i, _decoded(values + at, scales + first, i, n, length, KIND), mask=i < n)


@triton.jit(do_not_specialize=["weight_bits"])
def _accumulate(table, values, sum, scales, weight_bits, KIND: tl.constexpr, BLOCK: tl.constexpr):
    _, at, first, rows, length = _line(table)
    weight = tl.cast(weight_bits, tl.int64).to(tl.float64, bitcast=True)
    n = rows * length
    for step in range(0, n, BLOCK):
        i = step + tl.arange(0, BLOCK)
        x = _decoded(values + at, scales + first, i, n, length, KIND).to(tl.float64)
        old = tl.load(sum + at + i, mask=i < n, other=0.0)
        tl.store(sum + at + i, old + weight * x, mask=i < n)
