"""What the update ops refuse, by name: wrong tensors, lines that do not cover the buffer, memory that is shared."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .._memory import check_apart, value_key

OPTIONAL = ("momentum_buffer", "grad_scale", "lr_scale")


def check_tensors(given: dict[str, Tensor | None], changed: tuple[str, ...], anew: bool = False) -> None:
    """Refuse what the bodies cannot take, naming the tensor, what it is and what was wanted.

    ``given``: the arguments by name, the first of them a buffer that tells size and device; those in OPTIONAL may be
    None. ``changed``: the names of those that a body writes, whose memory must be their own. ``anew``: look at values
    that were found good before, too.
    """
    tensors = cast(dict[str, Tensor], {k: v for k, v in given.items() if v is not None or k not in OPTIONAL})
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {type(value).__name__}, wanted a torch.Tensor")
    buffer, first = next(iter(tensors.items()))
    numel, layout = first.numel(), tensors["layout"]
    lines, rows = layout.shape[0] if layout.dim() else 0, _rows(tensors)
    special: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "steps": (torch.int32, (rows,)),
        "mask": (torch.bool, (rows,)),
        "layout": (torch.int64, (lines, 4)),
        "grad_scale": (torch.float32, ()),
        "lr_scale": (torch.float64, (lines,)),
    }
    for name, tensor in tensors.items():
        dtype, shape = special.get(name, (torch.float32, (numel,)))
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device != first.device:
            error = TypeError if tensor.dtype != dtype else ValueError
            found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise error(f"{name}: {found}, wanted {dtype} {shape} on {first.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: strides {tensor.stride()}, wanted a contiguous tensor")
    if torch.compiler.is_compiling():
        return  # there are no values and no addresses to look at
    _check_layout(layout, buffer, numel, rows, anew)
    if "lr_scale" in tensors:
        _check_lr_scale(tensors["lr_scale"], anew)
    check_apart(tensors, changed)


def _rows(tensors: dict[str, Tensor]) -> int:
    """How many rows there are: where mask and steps disagree, the layout tells which of them is wrong."""
    mask, steps, layout = tensors["mask"], tensors.get("steps"), tensors["layout"]
    if steps is None or steps.numel() == mask.numel() or layout.dim() != 2 or layout.shape[1] != 4 or not len(layout):
        return mask.numel()
    return int((layout[:, 1] + layout[:, 2]).max())


def _check_layout(layout: Tensor, buffer: str, numel: int, rows: int, anew: bool) -> None:
    """Every line must begin where the one before ends, and the last must end where the buffers do."""
    key = value_key(layout, numel, rows)
    if not anew and getattr(layout, "_fibecfed_checked", None) == key:
        return
    lines = layout.cpu()
    counts, lengths = lines[:, 2], lines[:, 3]
    fits = (counts >= 0) & (counts <= rows) & (lengths >= 0) & (lengths <= numel // counts.clamp(1, max(1, rows)))
    if not fits.all():
        line = int((~fits).nonzero()[0])
        raise ValueError(
            f"layout: line {line} has {int(counts[line])} rows of {int(lengths[line])} values, wanted a part of "
            f"{numel} values ({buffer}) in {rows} rows (mask)"
        )
    ends = torch.stack([counts * lengths, counts], 1).cumsum(0)
    starts = torch.cat([ends.new_zeros(1, 2), ends])
    wrong = (lines[:, :2] != starts[:-1]).any(1).nonzero()
    if len(wrong):
        line = int(wrong[0])
        found, wanted = (tuple(pair.tolist()) for pair in (lines[line, :2], starts[line]))
        raise ValueError(
            f"layout: line {line} starts at value {found[0]} and row {found[1]}, wanted {wanted[0]} and {wanted[1]}: "
            "lines must follow one another without holes"
        )
    end = tuple(starts[-1].tolist())
    if end != (numel, rows):
        raise ValueError(
            f"layout: covers {end[0]} values in {end[1]} rows, wanted {numel} values ({buffer}) in {rows} rows (mask)"
        )
    layout._fibecfed_checked = key  # type: ignore[attr-defined]


def _check_lr_scale(lr_scale: Tensor, anew: bool) -> None:
    key = value_key(lr_scale)
    if not anew and getattr(lr_scale, "_fibecfed_checked", None) == key:
        return
    good = (lr_scale >= 0) & lr_scale.isfinite()
    if not good.all():
        line = int((~good).nonzero()[0])
        raise ValueError(f"lr_scale: {float(lr_scale[line])} for line {line}, wanted finite numbers ≥ 0")
    lr_scale._fibecfed_checked = key  # type: ignore[attr-defined]
