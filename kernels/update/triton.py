"""Masked AdamW and SGD on CUDA: one launch, one program a line of the layout, memory touched for active rows only.

torch's sequence of float32 operations, each rounded on its own (no contraction to FMA, IEEE division and square root).
The bias corrections 1 − βˢ differ from row to row, so a program looks them up: two tables of powers of β in float64,
whose product covers every step an int32 can count.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import on_device_of
from .._launch import POWERS, UPDATE_BLOCK, UPDATE_WARPS, powers


@triton.jit
def _line(layout):
    """offset, first row, rows and row length of this program's line."""
    line = layout + tl.program_id(0) * 4
    rows, length = tl.load(line + 2).to(tl.int32), tl.load(line + 3).to(tl.int32)
    return tl.load(line), tl.load(line + 1), rows, length


@triton.jit
def _count_up(steps, mask, first_row, rows, BLOCK: tl.constexpr):
    """steps += 1 on the active rows of a line, after every thread has read them."""
    tl.debug_barrier()
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = tl.load(mask + first_row + row, mask=row < rows, other=0) != 0
        step = tl.load(steps + first_row + row, mask=active, other=0)
        tl.store(steps + first_row + row, step + 1, mask=active)


@triton.jit
def _complement_of_power(table, step, FINE: tl.constexpr):
    """1 − β**step in float64."""
    return 1.0 - tl.load(table + step % FINE) * tl.load(table + FINE + step // FINE)


# lr is float64: the step size lr / (1 − β1ˢ) is rounded once, as torch rounds it.
@triton.jit
def adamw_kernel(
    data, grad, exp_avg, exp_avg_sq, steps, mask, layout, powers1, powers2, lr: tl.float64, decay, weight1, beta2,
    weight2, eps, FINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """decay = 1 − lr·λ, weight1 = 1 − β1, weight2 = 1 − β2."""
    offset, first_row, rows, length = _line(layout)
    for start in range(0, rows * length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        row = first_row + i // length
        active = tl.load(mask + row, mask=i < rows * length, other=0) != 0
        if tl.max(active.to(tl.int32), 0) > 0:
            at = offset + i
            step = tl.load(steps + row, mask=active, other=0) + 1
            p = tl.load(data + at, mask=active, other=0.0) * decay
            g = tl.load(grad + at, mask=active, other=0.0)
            m = tl.load(exp_avg + at, mask=active, other=0.0)
            v = tl.load(exp_avg_sq + at, mask=active, other=0.0)
            # torch's lerp_ starts from the nearer end
            m = tl.where(weight1 < 0.5, m + weight1 * (g - m), g - (g - m) * (1.0 - weight1))
            v = v * beta2 + weight2 * g * g
            size = (lr / _complement_of_power(powers1, step, FINE)).to(tl.float32)
            root = tl.sqrt_rn(_complement_of_power(powers2, step, FINE).to(tl.float32))
            denom = tl.div_rn(tl.sqrt_rn(v), root) + eps
            tl.store(data + at, p - tl.div_rn(size * m, denom), mask=active)
            tl.store(exp_avg + at, m, mask=active)
            tl.store(exp_avg_sq + at, v, mask=active)
    _count_up(steps, mask, first_row, rows, BLOCK)


@triton.jit
def sgd_kernel(
    data, grad, momentum_buffer, steps, mask, layout, lr, momentum, undamped, weight_decay,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """undamped = 1 − dampening; momentum_buffer is not touched unless MOMENTUM."""
    offset, first_row, rows, length = _line(layout)
    for start in range(0, rows * length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        row = first_row + i // length
        active = tl.load(mask + row, mask=i < rows * length, other=0) != 0
        if tl.max(active.to(tl.int32), 0) > 0:
            at = offset + i
            p = tl.load(data + at, mask=active, other=0.0)
            g = tl.load(grad + at, mask=active, other=0.0)
            if DECAY:
                g += weight_decay * p
            if MOMENTUM:
                taken = tl.load(steps + row, mask=active, other=0)
                b = tl.load(momentum_buffer + at, mask=active & (taken > 0), other=0.0)
                b = tl.where(taken > 0, b * momentum + undamped * g, g)  # the first step of a row is not dampened
                tl.store(momentum_buffer + at, b, mask=active)
                if NESTEROV:
                    g += momentum * b
                else:
                    g = b
            tl.store(data + at, p - lr * g, mask=active)
    _count_up(steps, mask, first_row, rows, BLOCK)


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
            data, grad, exp_avg, exp_avg_sq, steps, mask, layout, *tables, *scalars, POWERS, UPDATE_BLOCK,
            num_warps=UPDATE_WARPS, enable_fp_fusion=False,
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
            weight_decay != 0, momentum != 0, nesterov, UPDATE_BLOCK,
            num_warps=UPDATE_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
