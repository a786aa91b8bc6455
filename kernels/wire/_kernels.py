"""The kernels of the wire on CUDA; their launches are in triton.py.

Rounding is by integer operations and without fused multiply-add, so that a message packed on a GPU has the bytes of one
packed on a CPU. KIND: see KINDS in triton.py.
"""
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def _line(table):
    at = table + tl.program_id(0).to(tl.int64) * 5
    rows, length = tl.load(at + 3).to(tl.int32), tl.load(at + 4).to(tl.int32)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), rows, length


@triton.jit
def pack_kernel(table, values, data, scales, KIND: tl.constexpr, BLOCK: tl.constexpr):
    start, at, first, rows, length = _line(table)
    if KIND == 4:
        _quantize_blocks(data + start, values + at // 2, scales + first, rows, length, BLOCK // 64)
    elif KIND == 3:
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
        scale, inverse = _scale(largest, 0x03FE0000, 127.0, ROWS)  # 127 · 2^-126
        tl.store(scales + r, scale, mask=r < rows)
        for column in range(0, length, COLUMNS):
            c = column + tl.arange(0, COLUMNS)
            inside = (r < rows)[:, None] & (c < length)[None, :]
            i = r[:, None] * length + c[None, :]
            q = _rounded(tl.load(data + i, mask=inside, other=0.0) * inverse[:, None])
            tl.store(values + i, q.to(tl.int8), mask=inside)


@triton.jit
def _scale(largest, smallest, levels, ROWS: tl.constexpr):
    """Scale and its inverse of rows by the bits of their largest magnitude; below ``smallest`` both are 0, since the
    scale would be subnormal."""
    most = largest.to(tl.float32, bitcast=True)
    zero = largest < smallest
    scale = tl.where(zero, 0.0, tl.math.div_rn(most, tl.full([ROWS], levels, tl.float32)))
    inverse = tl.where(zero, 0.0, tl.math.div_rn(tl.full([ROWS], levels, tl.float32), tl.where(zero, 1.0, most)))
    return scale, inverse


@triton.jit
def _rounded(x):
    """To the nearest integer, ties to even: with 1.5 · 2^23 added the low byte is its two's complement."""
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _quantize_blocks(data, values, scales, rows, length, ROWS: tl.constexpr):
    """int4: blocks of 64 values (or one shorter, the last of a parameter), two values a byte."""
    byte = tl.arange(0, 32)
    for row in range(0, rows, ROWS):
        r = row + tl.arange(0, ROWS)
        i = r[:, None] * 64 + 2 * byte[None, :]
        has_low = (r < rows)[:, None] & (2 * byte < length)[None, :]
        has_high = (r < rows)[:, None] & (2 * byte + 1 < length)[None, :]
        low = tl.load(data + i, mask=has_low, other=0.0)
        high = tl.load(data + i + 1, mask=has_high, other=0.0)
        magnitudes = tl.maximum(
            low.to(tl.int32, bitcast=True) & 0x7FFFFFFF, high.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        )
        scale, inverse = _scale(tl.max(magnitudes, 1), 0x01E00000, 7.0, ROWS)  # 7 · 2^-126
        tl.store(scales + r, scale, mask=r < rows)
        both = (_rounded(low * inverse[:, None]) & 15) | ((_rounded(high * inverse[:, None]) & 15) << 4)
        tl.store(values + r[:, None] * 32 + byte[None, :], both.to(tl.uint8), mask=has_low)


@triton.jit
def _at(values, at, KIND: tl.constexpr):
    """The element where a line's values begin."""
    if KIND == 4:
        return values + at // 2
    return values + at


@triton.jit
def _decoded(values, scales, i, n, length, KIND: tl.constexpr):
    w = tl.load(values + (i // 2 if KIND == 4 else i), mask=i < n, other=0)
    if KIND == 4:
        q = (((w.to(tl.int32) >> (i % 2 * 4)) & 15) ^ 8) - 8  # the half byte's sign
        x = q.to(tl.float32) * tl.load(scales + i // length, mask=i < n, other=0.0)
    elif KIND == 1:
        x = (w.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == 3:
        x = w.to(tl.float32) * tl.load(scales + i // length, mask=i < n, other=0.0)
    else:
        x = w.to(tl.float32)
    return x


@triton.jit
def unpack_kernel(table, values, data, scales, KIND: tl.constexpr, BLOCK: tl.constexpr):
    start, at, first, rows, length = _line(table)
    n = rows * length
    for step in range(0, n, BLOCK):
        i = step + tl.arange(0, BLOCK)
        tl.store(data + start + i, _decoded(_at(values, at, KIND), scales + first, i, n, length, KIND), mask=i < n)


@triton.jit(do_not_specialize=["weight_bits"])
def accumulate_kernel(table, values, sum, scales, weight_bits, KIND: tl.constexpr, BLOCK: tl.constexpr):
    start, at, first, rows, length = _line(table)
    weight = tl.cast(weight_bits, tl.int64).to(tl.float64, bitcast=True)
    n = rows * length
    for step in range(0, n, BLOCK):
        i = step + tl.arange(0, BLOCK)
        x = _decoded(_at(values, at, KIND), scales + first, i, n, length, KIND).to(tl.float64)
        old = tl.load(sum + start + i, mask=i < n, other=0.0)
        tl.store(sum + start + i, old + weight * x, mask=i < n)
