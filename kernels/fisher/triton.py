"""Fisher diagonal on CUDA: per-sample gradients live in a program's registers, never in memory.

The grid is (feature tile of a matrix, sample group). A program walks over the samples of its group, sums thinᵀ·wide
over a sample's tokens into float32 registers, squares, and adds to its tile of the diagonal; scores leave as one
partial sum a tile. A second, small launch adds the partials in a fixed order: no atomics, the same input gives the same
bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._backend import interpreting, on_device_of
from .._launch import (
    GROUPED_VALUES,
    MAX_GROUPS,
    SCORE_BLOCK,
    VALUE_BLOCK,
    FisherPlan,
    finish_grid,
    linear_plan,
    lora_plan,
    sample_groups,
)
from ._kernels import finish_kernel, fisher_kernel


def _launch(
    plan: FisherPlan,
    wides: tuple[Tensor, ...],
    thins: tuple[tuple[Tensor, ...], ...],
    cu_seqlens: Tensor | None,
    weight_grad: bool,
    limit: int,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """scores (matrices, N), flat diag, flat weight_grad or empty."""
    first = wides[0]
    if cu_seqlens is None:
        (samples, tokens), total = first.shape[:2], 0
    else:
        samples, tokens, total = cu_seqlens.numel() - 1, 0, first.shape[0]
        cu_seqlens = cu_seqlens.contiguous()  # the kernel reads it from its address on
    groups = sample_groups(samples, limit)
    matrices = len(plan.bounds) - 1
    if samples == 0 or plan.values == 0:
        zeros = first.new_zeros(plan.values, dtype=torch.float32)
        return zeros.new_zeros(matrices, samples), zeros, zeros.clone() if weight_grad else zeros.new_zeros(0)
    scores = first.new_empty((matrices, samples), dtype=torch.float32)
    diag = first.new_empty(plan.values, dtype=torch.float32)
    grad = torch.empty_like(diag) if weight_grad else None
    partial = first.new_empty((plan.bounds[-1], samples), dtype=torch.float32)
    diag_parts = diag if groups == 1 else diag.new_empty((groups, plan.values))
    grad_parts = grad if groups == 1 or grad is None else torch.empty_like(diag_parts)
    widths = tuple(wide.shape[-1] for wide in wides)
    with on_device_of(first):
        fisher_kernel[(plan.tiles, groups)](
            wides, widths, thins, plan.bases, plan.slots, cu_seqlens, weights, tokens, total, samples, partial,
            diag_parts, grad_parts, plan.values, plan.ranks, plan.starts, plan.transposed, plan.rows, plan.thin_tiles,
            plan.tile.features, plan.tile.tokens, interpreting(),
            num_warps=plan.tile.warps, num_stages=plan.tile.stages,
            enable_fp_fusion=False,  # or squares were fused with their sum, and only where a gradient is wanted
        )  # fmt: skip
        finish_kernel[finish_grid(plan, samples, groups)](
            partial, scores, plan.bounds, samples, diag_parts, diag, grad_parts, grad, groups, plan.values,
            SCORE_BLOCK, VALUE_BLOCK,
        )  # fmt: skip
    return scores, diag, diag.new_empty(0) if grad is None else grad


def fisher_diag(
    x: Tensor, grad_y: Tensor, cu_seqlens: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """scores (N,), diag (d_out, d_in), weight_grad (d_out, d_in) or empty; see the public op for the meaning."""
    shape = (grad_y.shape[-1], x.shape[-1])
    plan = linear_plan(shape[1], shape[0], x.element_size())
    x, grad_y = x.contiguous(), grad_y.contiguous()
    wide, thin = (grad_y, x) if plan.transposed[0] else (x, grad_y)
    scores, diag, grad = _launch(plan, (wide,), ((thin,),), cu_seqlens, weight_grad, _groups_of(plan))
    return scores[0], diag.view(shape), grad.view(shape) if weight_grad else grad


def weighted_grad(x: Tensor, grad_y: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Σ_n weights[n] · G_n, (d_out, d_in): the kernel's weight_grad with a factor a sample."""
    shape = (grad_y.shape[-1], x.shape[-1])
    plan = linear_plan(shape[1], shape[0], x.element_size())
    x, grad_y = x.contiguous(), grad_y.contiguous()
    wide, thin = (grad_y, x) if plan.transposed[0] else (x, grad_y)
    return _launch(plan, (wide,), ((thin,),), cu_seqlens, True, _groups_of(plan), weights.contiguous())[2].view(shape)


def _groups_of(plan: FisherPlan) -> int:
    """Of one linear module: the results may be as large as its weight, and parts of them a multiple of that."""
    return MAX_GROUPS if plan.values <= GROUPED_VALUES else 1


def lora_fisher_diag(
    x: Tensor,
    h: Sequence[Tensor],
    grad_h: Sequence[Tensor],
    grad_y: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """scores (2·modules, N) and the flat diag and weight_grad of A_0, B_0, A_1, B_1, … one after the other."""
    ranks, d_outs = tuple(t.shape[-1] for t in h), tuple(t.shape[-1] for t in grad_y)
    plan = lora_plan(x.shape[-1], ranks, d_outs, x.element_size())
    wides = (x.contiguous(), *(t.contiguous() for t in grad_y))
    thins = (tuple(t.contiguous() for t in grad_h), *((t.contiguous(),) for t in h))
    return _launch(plan, wides, thins, cu_seqlens, weight_grad, limit=MAX_GROUPS)
