"""Products with the Hessian of a loss over values of the flat buffer, and the gradients they are made of.

``flat`` is a :class:`fibecfed.adapter.FlatAdapter`. ``loss`` is a function without arguments that computes the scalar
loss of one fixed batch at the current values. It must be deterministic: differences of losses with dropout are noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

Loss = Callable[[], Tensor]
Method = Literal["differences", "double_backward"]


class Flat(Protocol):
    """What this module needs of a FlatAdapter."""

    @property
    def data(self) -> nn.Parameter: ...

    @property
    def grad(self) -> Tensor: ...

    @property
    def entries(self) -> Sequence[Any]: ...  # of fibecfed_kernels.Entry

    @property
    def model(self) -> nn.Module: ...

    def values(self, layer: int | None) -> slice: ...

    def zero_grad(self) -> None: ...


def hvp(
    flat: Flat,
    loss: Loss,
    v: Tensor,
    *,
    method: Method = "differences",
    step: float | None = None,
    span: slice | None = None,
) -> Tensor:
    """H·v with H the Hessian of ``loss`` over the LoRA parameters (the head stands still), at the current values.

    differences::

        H v ≈ ‖v‖ · (∇L(P + s·v/‖v‖) − ∇L(P − s·v/‖v‖)) / (2s),    s = ε^{1/3} · max(1, ‖P‖) by default [ours]

    ε is the machine epsilon of ``flat.data``: at ε^{1/3} rounding and the third derivative cost about the same.
    double_backward: exact, but the model's operations must have a second derivative (use eager attention; the fused CPU
    attention has none).

    Args:
        v: float (d,), d = number of values in ``span`` of the flat buffer (None: all LoRA values).
        step: s > 0, length of the step.

    Returns (d,) with the dtype and device of ``flat.data``. ``flat.data`` and ``flat.grad`` come back bit by bit.
    Raises ValueError naming the argument.
    """
    values = span_of(flat, span)
    if v.shape != (values.stop - values.start,):
        raise ValueError(f"v: shape {tuple(v.shape)}, wanted ({values.stop - values.start},), the values of span")
    if step is not None and not 0.0 < step < math.inf:
        raise ValueError(f"step: {step}, wanted 0 < step < ∞")
    v = v.detach().to(flat.data)
    length = float(torch.linalg.vector_norm(v, dtype=torch.float64))
    if length == 0.0:
        return torch.zeros_like(v)
    if method == "double_backward":
        return _double_backward(flat, loss, v, values)
    if method != "differences":
        raise ValueError(f"method: {method!r}, wanted 'differences' or 'double_backward'")
    s = torch.finfo(v.dtype).eps ** (1 / 3) * scale(flat, values) if step is None else step
    ahead = gradient(flat, loss, values, v * (s / length))
    behind = gradient(flat, loss, values, v * (-s / length))
    return (ahead - behind) * (length / (2 * s))


def span_of(flat: Flat, span: slice | None) -> slice:
    """``span``, or all LoRA values: they come first in the buffer, the head last."""
    return slice(0, flat.values(None).start) if span is None else span


def scale(flat: Flat, values: slice) -> float:
    """max(1, ‖P‖) over some values, the unit that steps are measured in."""
    return max(1.0, float(torch.linalg.vector_norm(flat.data.detach()[values], dtype=torch.float64)))


def gradient(flat: Flat, loss: Loss, values: slice, shift: Tensor | None = None) -> Tensor:
    """∇L over some values at P + shift; values and gradients are put back by copying, which undoes no rounding."""
    data, grad = flat.data.detach().clone(), flat.grad.detach().clone()
    try:
        if shift is not None:
            with torch.no_grad():
                flat.data[values].add_(shift)
        flat.zero_grad()
        with torch.enable_grad():
            loss().backward()
        return flat.grad[values].detach().clone()
    finally:
        with torch.no_grad():
            flat.data.copy_(data)
            flat.grad.copy_(grad)


def _double_backward(flat: Flat, loss: Loss, v: Tensor, values: slice) -> Tensor:
    entries = [e for e in flat.entries if values.start <= e.offset and e.offset + e.numel <= values.stop]
    leaves = [flat.model.get_parameter(entry.name) for entry in entries]
    parts = [v[e.offset - values.start :][: e.numel].view(e.shape) for e in entries]
    with torch.enable_grad():
        grads = torch.autograd.grad(loss(), leaves, create_graph=True, allow_unused=True)
        along = [(g * part).sum() for g, part in zip(grads, parts, strict=True) if g is not None and g.requires_grad]
        if not along:  # a loss linear in the parameters, or without them
            return torch.zeros_like(v)
        products = torch.autograd.grad(torch.stack(along).sum(), leaves, allow_unused=True)
    pairs = zip(products, leaves, strict=True)
    return torch.cat([(torch.zeros_like(leaf) if h is None else h).flatten() for h, leaf in pairs]).to(v)
