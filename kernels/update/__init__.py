"""Optimizer steps that really freeze rows: checks and dispatch; the bodies are reference, C++ and Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  the schemas must exist before a body is called
from .._dispatch import run
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
        layout: int64 (lines, 4) from :func:`fibecfed_kernels.row_layout`, on the same device.
        lr, betas, eps, weight_decay: as torch.optim.AdamW.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, device or hyper-parameter.
    """
    check_adamw(lr, betas, eps, weight_decay)
    _check_tensors(data, steps, mask, layout, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    hyper = map(float, (lr, *betas, eps, weight_decay))
    args = (data, grad, exp_avg, exp_avg_sq, steps, mask, layout, *hyper)
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
) -> None:
    """One SGD step on the active rows of a flat buffer, in place, in one launch.

    For every active row, with g' = g + λp and s = ``steps[row] += 1``::

        b ← g' if s = 1 else μ·b + (1 − τ) g';   p ← p − lr·(g' + μ·b if nesterov else b)      (b = g' when μ = 0)

    which is torch.optim.SGD had the row been stepped only when active. Inactive rows keep everything exactly.

    Args: as :func:`masked_adamw_`; ``momentum_buffer`` float32 (numel,), or None when ``momentum`` is 0.
    Raises: as :func:`masked_adamw_`.
    """
    check_sgd(lr, momentum, dampening, weight_decay, nesterov)
    if momentum_buffer is None:
        _check_tensors(data, steps, mask, layout, grad=grad)
        if momentum != 0.0:
            raise ValueError(f"momentum_buffer: None, wanted float32 ({data.numel()},) since momentum is {momentum}")
        momentum_buffer = data.new_empty(0)
    else:
        _check_tensors(data, steps, mask, layout, grad=grad, momentum_buffer=momentum_buffer)
    hyper = (float(lr), float(momentum), float(dampening), float(weight_decay), bool(nesterov))
    with torch.no_grad():
        run("masked_sgd_", data, data, grad, momentum_buffer, steps, mask, layout, *hyper)
    _changed(data, momentum_buffer, steps)


def _changed(*tensors: Tensor) -> None:
    """Tell autograd: the bodies write through raw pointers, which it does not see."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def _check_tensors(data: Tensor, steps: Tensor, mask: Tensor, layout: Tensor, **like_data: Tensor) -> None:
    """Refuse what the bodies cannot take, naming the tensor, what it is and what was wanted."""
    given = {"data": data, "steps": steps, "mask": mask, "layout": layout, **like_data}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {type(value).__name__}, wanted a torch.Tensor")
    rows = mask.numel()
    wanted = {
        "data": (data, torch.float32, (data.numel(),)),
        **{name: (tensor, torch.float32, (data.numel(),)) for name, tensor in like_data.items()},
        "steps": (steps, torch.int32, (rows,)),
        "mask": (mask, torch.bool, (rows,)),
        "layout": (layout, torch.int64, (layout.shape[0] if layout.dim() else 0, 4)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device != data.device:
            error = TypeError if tensor.dtype != dtype else ValueError
            found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise error(f"{name}: {found}, wanted {dtype} {shape} on {data.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: strides {tensor.stride()}, wanted a contiguous tensor")
    _check_layout(data, mask, layout)


def _check_layout(data: Tensor, mask: Tensor, layout: Tensor) -> None:
    """The last line must end where the buffers end (row_layout proves the rest); read once per layout object."""
    if torch.compiler.is_compiling() or getattr(layout, "_fibecfed_checked", None) == (data.numel(), mask.numel()):
        return
    offset, first_row, rows, length = layout[-1].tolist() if len(layout) else (0, 0, 0, 0)
    end = (offset + rows * length, first_row + rows)
    if end != (data.numel(), mask.numel()):
        raise ValueError(
            f"layout: covers {end[0]} values in {end[1]} rows, wanted {data.numel()} values (data) "
            f"in {mask.numel()} rows (mask)"
        )
    layout._fibecfed_checked = end  # type: ignore[attr-defined]
