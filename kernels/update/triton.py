"""Masked AdamW and SGD on CUDA: one launch, one program a line of the layout, memory touched for active rows only.

torch's sequence of float32 operations, with a fused multiply-add exactly where torch has one on the CPU, IEEE division
and square root. The bias corrections 1 − βˢ differ from row to row, so a program looks them up: two tables of powers of
β in float64, whose product covers every step an int32 can count.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .._backend import interpreting, on_device_of
from .._launch import POWERS, UPDATE_BLOCK, UPDATE_WARPS, powers
from ._kernels import adamw_kernel, sgd_kernel


@lru_cache(maxsize=16)
def _powers_on(beta: float, device: torch.device) -> Tensor:
    fine, coarse = powers(beta)
    return torch.tensor(fine + coarse, dtype=torch.float64).to(device)


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
) -> None:
    """In place on data, exp_avg, exp_avg_sq, steps; see the public op for the meaning."""
    if layout.shape[0] == 0:
        return
    tables = _powers_on(beta1, data.device), _powers_on(beta2, data.device)
    scalars = [float(value) for value in (lr, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps)]
    with on_device_of(data):
        adamw_kernel[(layout.shape[0],)](
            data, grad, exp_avg, exp_avg_sq, steps, mask, layout, *tables, *scalars,
            POWERS, UPDATE_BLOCK, interpreting(), num_warps=UPDATE_WARPS, enable_fp_fusion=False,
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
) -> None:
    """In place on data, momentum_buffer (unless momentum is 0), steps; see the public op for the meaning."""
    if layout.shape[0] == 0:
        return
    with on_device_of(data):
        sgd_kernel[(layout.shape[0],)](
            data, grad, momentum_buffer, steps, mask, layout, lr, momentum, 1 - dampening, weight_decay,
            weight_decay != 0, momentum != 0, nesterov, UPDATE_BLOCK, interpreting(),
            num_warps=UPDATE_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
