"""The wire ops on CUDA: one launch an op, one program a line of the table. Meaning: reference.py.

Without fused multiply-add: see _kernels.py.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ._kernels import accumulate_kernel, pack_kernel, unpack_kernel

BLOCK = 1024  # values a step; a line of the table is about as long
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}  # uint8: two int4


def wire_pack_(data: Tensor, table: Tensor, values: Tensor, scales: Tensor) -> None:
    """See :func:`fibecfed_kernels.wire.reference.wire_pack_`."""
    _launch(pack_kernel, table, values, data, scales)


def wire_unpack_(values: Tensor, scales: Tensor, table: Tensor, data: Tensor) -> None:
    """See :func:`fibecfed_kernels.wire.reference.wire_unpack_`."""
    _launch(unpack_kernel, table, values, data, scales)


def wire_accumulate_(
    sum: Tensor, values: list[Tensor], scales: list[Tensor], table: Tensor, weights: list[float]
) -> None:
    """See :func:`fibecfed_kernels.wire.reference.wire_accumulate_`."""
    for values_of, scales_of, weight in zip(values, scales, weights, strict=True):
        bits = struct.unpack("<q", struct.pack("<d", weight))[0]  # a float argument is rounded to float32
        _launch(accumulate_kernel, table, values_of, sum, scales_of, bits)


def _launch(kernel, table, values, other, scales, *scalars):
    if len(table):
        raw = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
        args = (table, raw, other, scales, *scalars, KINDS[values.dtype], BLOCK)
        with torch.cuda.device_of(table):
            kernel[(len(table),)](*args, enable_fp_fusion=False)
