"""Checks of what a caller gives to the Fisher ops. Errors name the tensor, what it is and what was wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from .._memory import value_key

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def modules_of(name: str, given: Sequence[Tensor]) -> list[Tensor]:
    """One tensor a module; a tensor among lists would be taken apart sample by sample."""
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name}: {type(given).__name__}, wanted a list of tensors since h is one")
    return list(given)


def describe(t: Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} on {t.device}"


def check_pair(x_name: str, x: Tensor, grad_name: str, grad: Tensor, cu_seqlens: Tensor | None) -> None:
    """Refuse what the bodies cannot take, naming the tensor, what it is and what was wanted."""
    for name, tensor in ((x_name, x), (grad_name, grad)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {type(tensor).__name__}, wanted a torch.Tensor")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: {describe(tensor)}, wanted float32, bfloat16 or float16")
    if grad.dtype != x.dtype or grad.device != x.device:
        raise TypeError(f"{grad_name}: {describe(grad)}, wanted the dtype and device of {x_name}: {describe(x)}")
    if cu_seqlens is None:
        if x.dim() != 3:
            raise ValueError(f"{x_name}: {describe(x)}, wanted (N, T, features), or (total, features) with cu_seqlens")
    elif x.dim() != 2:
        raise ValueError(f"{x_name}: {describe(x)}, wanted (total, features) since cu_seqlens is given")
    if grad.dim() != x.dim() or grad.shape[:-1] != x.shape[:-1]:
        wanted = ", ".join(map(str, x.shape[:-1]))
        raise ValueError(f"{grad_name}: {describe(grad)}, wanted ({wanted}, features) as {x_name} has")
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, x)


def check_lora(
    x: Tensor, h: Tensor, grad_h: Tensor, grad_y: Tensor, cu_seqlens: Tensor | None, label: str = ""
) -> None:
    """The same for the four tensors of a LoRA pair; ``label`` stands behind the names of those that come in lists."""
    check_pair("x", x, f"grad_h{label}", grad_h, cu_seqlens)
    check_pair(f"h{label}", h, f"grad_y{label}", grad_y, cu_seqlens)
    if h.shape != grad_h.shape or h.dtype != x.dtype or h.device != x.device:
        raise ValueError(
            f"h{label}: {describe(h)}, wanted the shape of grad_h{label} {tuple(grad_h.shape)} and dtype and "
            f"device of x ({x.dtype}, {x.device})"
        )


def _check_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: {type(cu_seqlens).__name__}, wanted an int32 tensor (N+1,) on {x.device}")
    if (
        cu_seqlens.dtype != torch.int32
        or cu_seqlens.dim() != 1
        or cu_seqlens.numel() < 1
        or cu_seqlens.device != x.device
    ):
        raise ValueError(f"cu_seqlens: {describe(cu_seqlens)}, wanted int32 (N+1,) on {x.device}")
    if torch.compiler.is_compiling():
        return  # values are not known while tracing; the bodies never read past `total`
    key = value_key(cu_seqlens, x.shape[0])
    if getattr(cu_seqlens, "_fibecfed_checked", None) == key:
        return  # every module of a model is given the same
    good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == x.shape[0]) & (cu_seqlens.diff() >= 0).all()
    if cu_seqlens.device.type == "cuda":
        torch._assert_async(good)  # a check that waited for the device would cost more than the op
    elif not bool(good):
        raise ValueError(
            f"cu_seqlens: values must rise from 0 to {x.shape[0]} (the number of tokens), got {cu_seqlens.tolist()}"
        )
    cu_seqlens._fibecfed_checked = key  # type: ignore[attr-defined]


def check_clipping(scores: Tensor, max_norm: float, x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Refuse scores that are not one float32 a sample, and a norm that is not a positive number."""
    samples = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores: {type(scores).__name__}, wanted a torch.Tensor")
    if scores.dtype != torch.float32:
        raise TypeError(f"scores: {describe(scores)}, wanted float32 ({samples},)")
    if scores.shape != (samples,) or scores.device != x.device:
        raise ValueError(f"scores: {describe(scores)}, wanted float32 ({samples},) on {x.device}")
    if isinstance(max_norm, bool) or not isinstance(max_norm, Real) or not 0.0 < max_norm < math.inf:
        raise ValueError(f"max_norm: {max_norm!r}, wanted a number with 0 < max_norm < ∞")
