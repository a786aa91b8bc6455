"""Fisher diagonal in plain torch: the specification, the fallback, the tests' truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def _samples(x: Tensor, grad_y: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """(x_n, ∂y_n) of each sample as float32 matrices (tokens, features)."""
    if cu_seqlens is None:
        for n in range(x.shape[0]):
            yield x[n].float(), grad_y[n].float()
    else:
        bounds = cu_seqlens.tolist()
        for start, stop in pairwise(bounds):
            yield x[start:stop].float(), grad_y[start:stop].float()


def fisher_diag(
    x: Tensor, grad_y: Tensor, cu_seqlens: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """scores (N,), diag (d_out, d_in), weight_grad (d_out, d_in) or empty; see the public op for the meaning."""
    shape = (grad_y.shape[-1], x.shape[-1])
    diag = torch.zeros(shape, dtype=torch.float32, device=x.device)
    total = torch.zeros(shape if weight_grad else 0, dtype=torch.float32, device=x.device)
    scores = []
    for x_n, grad_n in _samples(x, grad_y, cu_seqlens):
        gradient = grad_n.T @ x_n  # G_n: summed over the tokens BEFORE squaring
        square = gradient.square()
        scores.append(square.sum())
        diag += square
        if weight_grad:
            total += gradient
    return torch.stack(scores) if scores else diag.new_zeros(0), diag, total


def weighted_grad(x: Tensor, grad_y: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Σ_n weights[n] · G_n, (d_out, d_in)."""
    total = torch.zeros((grad_y.shape[-1], x.shape[-1]), dtype=torch.float32, device=x.device)
    for weight, (x_n, grad_n) in zip(weights, _samples(x, grad_y, cu_seqlens), strict=True):
        total += weight * (grad_n.T @ x_n)
    return total


def lora_fisher_diag(
    x: Tensor, h: Sequence[Tensor], grad_h: Sequence[Tensor], grad_y: Sequence[Tensor], cu_seqlens: Tensor | None,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """scores (2·modules, N) and the flat diag and weight_grad of A_0, B_0, A_1, B_1, … one after the other."""
    parts = []
    for h_m, grad_h_m, grad_y_m in zip(h, grad_h, grad_y, strict=True):
        parts.append(fisher_diag(x, grad_h_m, cu_seqlens, weight_grad))
        parts.append(fisher_diag(h_m, grad_y_m, cu_seqlens, weight_grad))
    scores, diags, grads = zip(*parts, strict=True)
    return torch.stack(scores), torch.cat([d.flatten() for d in diags]), torch.cat([g.flatten() for g in grads])
