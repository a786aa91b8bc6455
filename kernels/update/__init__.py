"""Optimizer steps that really freeze rows: checks and dispatch; the bodies are reference, C++ and Triton."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  the schemas must exist before a body is called
from .._dispatch import run
from .arguments import check_tensors
from .hyper import check_adamw, check_sgd


def masked_adamw_(
    data: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    mask: Tensor,
    layout: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_scale: Tensor | None = None,
    lr_scale: Tensor | None = None,
) -> None:
    """One AdamW step on the active rows of a flat buffer, in place, in one launch.

    For every row with ``mask[row]``, with s = ``steps[row] += 1``::

        p ← p·(1 − lr·λ);  m ← m + (1 − β1)(g − m);  v ← β2·v + (1 − β2) g²
        p ← p − lr/(1 − β1ˢ) · m / (√v/√(1 − β2ˢ) + ε)

    which is torch.optim.AdamW had the row been stepped only when active. An inactive row keeps value, both moments,
    decay and step count exactly; its gradient is not read.

    Args:
        data, grad, exp_avg, exp_avg_sq: float32 (numel,), contiguous; all but ``grad`` are changed.
        steps: int32 (num_rows,), steps taken by each row so far; changed.
        mask: bool (num_rows,).
        layout: int64 (lines, 4) from :func:`fibecfed_kernels.row_layout`, on the same device. It is read and checked
            once an object, and again when it was changed in place.
        lr, betas, eps, weight_decay: as torch.optim.AdamW.
        grad_scale: float32 (), g is multiplied by it, and rounded, before anything else; ``grad`` itself stays as it
            is. None: g is not multiplied.
        lr_scale: float64 (lines,), finite and ≥ 0, checked as ``layout`` is: a line's learning rate is
            lr·lr_scale[line], also in the decay 1 − lr·λ, as in a parameter group with that lr. None: lr everywhere.

    Raises TypeError for a wrong dtype; ValueError for a wrong shape, device or hyper-parameter, for a layout that does
    not cover the buffer line by line, and for changed tensors that share memory with any other.
    """
    check_adamw(lr, betas, eps, weight_decay)
    given = {"data": data, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "steps": steps, "mask": mask}
    scales = {"grad_scale": grad_scale, "lr_scale": lr_scale}
    check_tensors({**given, "layout": layout, **scales}, changed=("data", "exp_avg", "exp_avg_sq", "steps"))
    hyper = map(float, (lr, *betas, eps, weight_decay))
    args = (data, grad, exp_avg, exp_avg_sq, steps, mask, layout, *hyper, grad_scale, lr_scale)
    with torch.no_grad():
        run("masked_adamw_", data, *args)
    _changed(data, exp_avg, exp_avg_sq, steps)


def masked_sgd_(
    data: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    steps: Tensor,
    mask: Tensor,
    layout: Tensor,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    grad_scale: Tensor | None = None,
    lr_scale: Tensor | None = None,
) -> None:
    """One SGD step on the active rows of a flat buffer, in place, in one launch.

    For every active row, with g' = g + λp and s = ``steps[row] += 1``::

        b ← g' if s = 1 else μ·b + (1 − τ) g';   p ← p − lr·(g' + μ·b if nesterov else b)      (b = g' when μ = 0)

    which is torch.optim.SGD had the row been stepped only when active. Inactive rows keep everything exactly.

    Args: as :func:`masked_adamw_`; ``momentum_buffer`` float32 (numel,), or None when ``momentum`` is 0.
    Raises: as :func:`masked_adamw_`.
    """
    check_sgd(lr, momentum, dampening, weight_decay, nesterov)
    given = {"data": data, "grad": grad, "momentum_buffer": momentum_buffer, "steps": steps, "mask": mask}
    scales = {"grad_scale": grad_scale, "lr_scale": lr_scale}
    check_tensors({**given, "layout": layout, **scales}, changed=("data", "momentum_buffer", "steps"))
    if momentum_buffer is None:
        if momentum != 0.0:
            raise ValueError(f"momentum_buffer: None, wanted float32 ({data.numel()},) since momentum is {momentum}")
        momentum_buffer = data.new_empty(0)
    hyper = (float(lr), float(momentum), float(dampening), float(weight_decay), bool(nesterov))
    with torch.no_grad():
        run("masked_sgd_", data, data, grad, momentum_buffer, steps, mask, layout, *hyper, grad_scale, lr_scale)
    _changed(data, momentum_buffer, steps)


def masked_grad_norm(grad: Tensor, mask: Tensor, layout: Tensor) -> Tensor:
    """The Euclidean norm of the active rows' gradients, in one pass.

    norm = √Σ g² over the values of every row with ``mask[row]``. Squares and sums are float64, added in an order that
    depends on mask and layout alone: the same input gives the same bits, whatever the number of threads. An inactive
    row is not read, so a NaN there does not show.

    Args: as :func:`masked_adamw_`; nothing is changed.
    Returns float32 () on the device of ``grad``; 0 where no row is active.
    Raises: as :func:`masked_adamw_`.
    """
    check_tensors({"grad": grad, "mask": mask, "layout": layout}, changed=())
    with torch.no_grad():
        return cast(Tensor, run("masked_grad_norm", grad, grad, mask, layout))


def _changed(*tensors: Tensor) -> None:
    """Tell autograd: the bodies write through raw pointers, which it does not see."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)
