"""Optimizer steps that really freeze rows: checks and dispatch; the bodies are reference, C++ and Triton."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  the schemas must exist before a body is called
from .._backend import runs_cpp
from .._dispatch import run
from .arguments import check_tensors
from .hyper import checked_adamw, checked_sgd


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
        layout: int64 (lines, 4) from :func:`fibecfed_kernels.row_layout`, on the same device. Off the CPU it is read
            and checked once an object, and again when it was changed in place.
        lr, betas, eps, weight_decay: as torch.optim.AdamW.
        grad_scale: float32 (), g is multiplied by it, and rounded, before anything else; ``grad`` itself stays as it
            is. None: g is not multiplied.
        lr_scale: float64 (lines,), finite and ≥ 0, checked as ``layout`` is: a line's learning rate is
            lr·lr_scale[line], also in the decay 1 − lr·λ, as in a parameter group with that lr. None: lr everywhere.

    Raises TypeError for a wrong dtype; ValueError for a wrong shape, device or hyper-parameter, for a layout that does
    not cover the buffer line by line, and for changed tensors that share memory with any other.
    """
    hyper = checked_adamw(lr, betas, eps, weight_decay)
    tensors = {
        "data": data, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "steps": steps, "mask": mask,
        "layout": layout,
    }  # fmt: skip
    scales = {"grad_scale": grad_scale, "lr_scale": lr_scale}
    _run("masked_adamw_", tensors, hyper, scales, ("data", "exp_avg", "exp_avg_sq", "steps"))


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
    hyper = checked_sgd(lr, momentum, dampening, weight_decay, nesterov)
    if momentum_buffer is None and momentum != 0.0:
        raise ValueError(f"momentum_buffer: None, wanted a tensor like data, since momentum is {momentum}")
    tensors = {
        "data": data, "grad": grad, "momentum_buffer": momentum_buffer, "steps": steps, "mask": mask, "layout": layout,
    }  # fmt: skip
    scales = {"grad_scale": grad_scale, "lr_scale": lr_scale}
    if momentum_buffer is not None and momentum == 0.0:  # not looked at by the bodies
        check_tensors({**tensors, **scales}, ("data", "momentum_buffer", "steps"))
    _run("masked_sgd_", tensors, hyper, scales, ("data", "momentum_buffer", "steps"))


def masked_grad_norm(grad: Tensor, mask: Tensor, layout: Tensor) -> Tensor:
    """The Euclidean norm of the active rows' gradients, in one pass.

    norm = √Σ g² over the values of every row with ``mask[row]``. Squares and sums are float64, added in an order that
    depends on mask and layout alone: the same input gives the same bits, whatever the number of threads. An inactive
    row is not read, so a NaN there does not show.

    Args: as :func:`masked_adamw_`; nothing is changed.
    Returns float32 () on the device of ``grad``; 0 where no row is active.
    Raises: as :func:`masked_adamw_`.
    """
    return cast(Tensor, _run("masked_grad_norm", {"grad": grad, "mask": mask, "layout": layout}, (), {}, ()))


def _run(
    name: str,
    tensors: Mapping[str, Tensor | None],
    hyper: tuple[float | bool, ...],
    scales: Mapping[str, Tensor | None],
    changed: tuple[str, ...],
) -> Tensor | None:
    """Check the tensors and run the op. C++ checks by itself what it is given, so the checks in Python, which cost as
    much as a small adapter's step, are left for what it refuses: they say by name what is wrong."""
    given = {**tensors, **scales}
    first = cast(Tensor, next(iter(given.values())))  # a buffer, never None unless somebody errs
    refused: Exception | None = None
    try:
        if runs_cpp(first) and not any(t is not None and (t.requires_grad or not t.is_cpu) for t in given.values()):
            op = getattr(torch.ops.fibecfed, name).default
            result = op(*_or_empty(first, tensors), *hyper, *scales.values())
        else:
            check_tensors(given, changed)
            with torch.no_grad():
                result = run(name, first, *_or_empty(first, tensors), *hyper, *scales.values())
    except Exception as error:
        refused = error
    if refused is not None:
        check_tensors(given, changed, anew=True)
        raise refused
    if changed and not torch.compiler.is_compiling():  # the bodies write through raw pointers, which autograd misses
        torch.autograd.graph.increment_version([t for n in changed if (t := tensors[n]) is not None])
    return cast("Tensor | None", result)


def _or_empty(like: Tensor, tensors: Mapping[str, Tensor | None]) -> list[Tensor]:
    """A momentum buffer that is not there is empty to the bodies."""
    return [like.new_empty(0) if t is None else t for t in tensors.values()]
