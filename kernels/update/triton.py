"""Masked AdamW, SGD and norm on CUDA: one program a line of the layout, memory touched for active rows only.

A step is one launch; the norm is two, for the sums of the lines and for the sum of these.

torch's sequence of float32 operations, with a fused multiply-add exactly where torch has one on the CPU, IEEE division
and square root. The bias corrections 1 − βˢ differ from row to row, so a program looks them up: two tables of powers of
β in float64, whose product covers every step an int32 can count.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .._backend import interpreting, on_device_of
from .._launch import POWERS, UPDATE_BLOCK, UPDATE_WARPS, powers
from ._kernels import adamw_kernel, norm_kernel, sgd_kernel, squares_kernel


@cache  # a captured CUDA graph knows a table by its address
def _powers_on(beta: float, device: torch.device) -> Tensor:
    fine, coarse = powers(beta)
    return torch.tensor(fine + coarse, dtype=torch.float64).to(device)


def _scales(
    data: Tensor, grad_scale: Tensor | None, lr_scale: Tensor | None
) -> tuple[tuple[Tensor, Tensor], tuple[bool, bool]]:
    """What a kernel is given for the two, something that it does not read for None, and which of them it reads."""
    given = (data if grad_scale is None else grad_scale, data if lr_scale is None else lr_scale)
    return given, (grad_scale is not None, lr_scale is not None)


def masked_adamw_(
    data: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    mask: Tensor,
    layout: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    lr_scale: Tensor | None = None,
) -> None:
    """In place on data, exp_avg, exp_avg_sq, steps; see the public op for the meaning."""
    if layout.shape[0] == 0:
        return
    tables = _powers_on(beta1, data.device), _powers_on(beta2, data.device)
    scales, scaled = _scales(data, grad_scale, lr_scale)
    scalars = [float(value) for value in (lr, weight_decay, 1 - beta1, beta2, 1 - beta2, eps)]
    with on_device_of(data):
        adamw_kernel[(layout.shape[0],)](
            data, grad, exp_avg, exp_avg_sq, steps, mask, layout, *tables, *scales, *scalars,
            *scaled, POWERS, UPDATE_BLOCK, interpreting(), num_warps=UPDATE_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def masked_sgd_(
    data: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    steps: Tensor,
    mask: Tensor,
    layout: Tensor,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    grad_scale: Tensor | None = None,
    lr_scale: Tensor | None = None,
) -> None:
    """In place on data, momentum_buffer (unless momentum is 0), steps; see the public op for the meaning."""
    if layout.shape[0] == 0:
        return
    scales, scaled = _scales(data, grad_scale, lr_scale)
    scalars = [float(value) for value in (lr, momentum, 1 - dampening, weight_decay)]
    with on_device_of(data):
        sgd_kernel[(layout.shape[0],)](
            data, grad, momentum_buffer, steps, mask, layout, *scales, *scalars,
            *scaled, weight_decay != 0, momentum != 0, nesterov, UPDATE_BLOCK, interpreting(),
            num_warps=UPDATE_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def masked_grad_norm(grad: Tensor, mask: Tensor, layout: Tensor) -> Tensor:
    """float32 (); see the public op for the meaning."""
    lines = layout.shape[0]
    partial = grad.new_empty(lines, dtype=torch.float64)
    norm = grad.new_empty(())
    with on_device_of(grad):
        if lines > 0:
            squares_kernel[(lines,)](grad, mask, layout, partial, UPDATE_BLOCK, num_warps=UPDATE_WARPS)
        norm_kernel[(1,)](partial, norm, lines, UPDATE_BLOCK, num_warps=UPDATE_WARPS)
    return norm
