"""clip_sample_gradients: sums of per-sample gradients, each clipped over the whole adapter, in one backward pass.

The norms come out of the Fisher kernel, the clipped sum out of one more weighted pass over what the backward saw.
"""

from __future__ import annotations

import math
from numbers import Real
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fibecfed_kernels import clipped_grad, fisher_diag, use_backend

from .backward import FisherCaptureError, Forward, LoraBackward, as_batch, backend_of, past_its_module
from .lora import HeadLinear, trainable_linears
from .sharing import Found, Seen

SMALLEST_NORM = 1e-14  # of what a backward brings: the squares of a thousandth of it are still float32 numbers


class _Kept(NamedTuple):
    """One matrix's tensors, from its backward to the end of the block: its gradients go to ``weight`` and ``bias``."""

    weight: Tensor | None
    bias: Tensor | None
    x: Tensor
    grad_y: Tensor
    cu_seqlens: Tensor | None
    scores: Tensor


class clip_sample_gradients(LoraBackward):
    """Context manager: the backward run inside it leaves sums of clipped per-sample gradients in ``.grad``::

        Σ_n min(1, C / ‖g_n‖) · g_n,    C = max_norm

    with g_n the gradient of sample n's own loss by ALL trainable parameters, LoRA and task head together. As a
    backward does, it adds to a ``.grad`` that is there. It is a sum, whatever the loss was: nothing is divided by N.

    Usage::

        with clip_sample_gradients(model, max_norm=1.0) as clipped:
            model(**batch).loss.backward()
        clipped.scores, clipped.factors  # (N,) ‖g_n‖², (N,) min(1, C / ‖g_n‖), float32; private, not noised

    Per-sample gradients are never in memory, and there is no second backward. Instead every LoRA pair's inputs and
    output gradients are kept to the end of the block: N·T·(d_in + d_out + 2r) values, of which the plain backward would
    have freed each block's as it went. ``scores`` and ``factors`` are there when the block has ended.

    Args:
        model: a PEFT model whose trainable parameters are LoRA on nn.Linear, and weights and biases of other nn.Linear.
        max_norm: C > 0.
        reduction, loss_scale, cu_seqlens, num_samples: as for :class:`fibecfed.capture_fisher`.

    Raises as :class:`fibecfed.capture_fisher`; also UnsupportedModuleError, naming it, for a trainable parameter that
    is none of these, for DistributedDataParallel, and for BatchNorm that mixes samples; FisherCaptureError for one that
    gets a gradient past its module (a term of the loss that reads a weight itself), which could not be clipped;
    ValueError when a sample's gradient is not finite. In all these cases ``.grad`` stays what it was.

    Source: Abadi et al., 2016 (arXiv 1607.00133), algorithm 1; keeping the layers' inputs and output gradients for the
    weighted sum is the book-keeping of Bu et al., 2023 (arXiv 2210.00038).
    """

    def __init__(
        self,
        model: nn.Module,
        max_norm: float,
        reduction: Literal["mean", "sum"] = "mean",
        *,
        loss_scale: float = 1.0,
        cu_seqlens: Tensor | None = None,
        num_samples: int | None = None,
    ) -> None:
        super().__init__(model, reduction, loss_scale=loss_scale, cu_seqlens=cu_seqlens, num_samples=num_samples)
        self.max_norm = checked_number("max_norm", max_norm, positive=True)
        self._kept: list[_Kept] = []
        self._scores: Tensor | None = None
        self._factors: Tensor | None = None
        self._hooks: list[Any] = []

    @property
    def scores(self) -> Tensor:
        """float32 (N,): ‖g_n‖² over all trainable parameters, before clipping."""
        if self._scores is None:
            raise FisherCaptureError("scores: not there yet; they are ready when the block has ended")
        return self._scores

    @property
    def factors(self) -> Tensor:
        """float32 (N,): min(1, C / ‖g_n‖)."""
        if self._factors is None:
            raise FisherCaptureError("factors: not there yet; they are ready when the block has ended")
        return self._factors

    def __enter__(self) -> clip_sample_gradients:
        self._kept, self._scores, self._factors = [], None, None
        super().__enter__()
        # autograd itself must bring no gradient to any of them: it would not be clipped
        self._hooks = [p.register_hook(_refuse(n)) for n, p in self.model.named_parameters() if p.requires_grad]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._kept, self._hooks = [], []

    def _find_heads(self) -> list[HeadLinear]:
        return trainable_linears(self.model, self._pairs)

    def _patches(self) -> dict[nn.Linear, Forward]:
        return {**super()._patches(), **{head.linear: self._forward_head(head) for head in self._heads}}

    def _forward_head(self, head: HeadLinear) -> Forward:
        return lambda x: _Head.apply(x, head.linear.weight, head.linear.bias, self, head)

    def _take(self, seen: Seen, found: Found) -> None:
        for linear, x, grad_y, part in (
            (seen.pair.a, seen.x, seen.grad_h, found.a),
            (seen.pair.b, seen.h, seen.grad_y, found.b),
        ):
            if part is not None:
                self._kept.append(_Kept(linear.weight, None, x, grad_y, self.cu_seqlens, part.scores))

    def _head_backward(self, head: HeadLinear, x: Tensor, grad_y: Tensor, cu_seqlens: Tensor | None) -> None:
        """Takes a trainable linear's tensors; in a packed batch they may be packed too, or one row a sample."""
        weight, bias = (
            p if p is not None and p.requires_grad else None for p in (head.linear.weight, head.linear.bias)
        )
        ones = [x.new_ones((*x.shape[:-1], 1))] if bias is not None else []  # a bias is the weight of an input of 1
        x = torch.cat([*([x] if weight is not None else []), *ones], dim=-1)
        self._kept.append(_Kept(weight, bias, x, grad_y, cu_seqlens, fisher_diag(x, grad_y, cu_seqlens).scores))

    def _finish(self, scale: float) -> None:
        if scale * SMALLEST_NORM > self.max_norm:
            raise ValueError(
                f"loss_scale: {self.loss_scale!r} makes gradients of norm {self.max_norm} (max_norm) too small to be "
                "squared in float32; scale the loss less"
            )
        seen = torch.stack([kept.scores for kept in self._kept]).sum(0)
        scores = (seen.double() * scale**2).float()
        if not bool((seen + scores).isfinite().all()):
            bad = [n for n, finite in enumerate((seen + scores).isfinite().tolist()) if not finite]
            raise ValueError(f"gradient of sample {', '.join(map(str, bad))} of the batch: not finite, wanted finite")
        self._scores = scores
        self._factors = (self.max_norm / self._scores.sqrt()).clamp(max=1.0)
        while self._kept:
            kept = self._kept.pop()
            total = clipped_grad(kept.x, kept.grad_y, seen, self.max_norm / scale, kept.cu_seqlens).mul_(scale)
            if kept.bias is not None:
                accumulate(kept.bias, total[:, -1])
                total = total[:, :-1]
            if kept.weight is not None:
                accumulate(kept.weight, total)


class _Head(torch.autograd.Function):
    """y = x Wᵀ + b of a trainable linear module outside LoRA. W and b are inputs, so that y has a gradient without x's
    having one; theirs are the taker's to make."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, taker: clip_sample_gradients, head: HeadLinear
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        ctx.save_for_backward(x.to(y.dtype), weight)
        ctx.taker, ctx.head, ctx.x_dtype, ctx.x_shape, ctx.backend = taker, head, x.dtype, x.shape, backend_of(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        cu_seqlens = ctx.taker.cu_seqlens
        if x.dim() < 2:
            raise FisherCaptureError(f"{ctx.head.name}: its input is {tuple(x.shape)}, wanted the samples on an axis")
        if cu_seqlens is not None and (rows := x.shape[:-1].numel()) == cu_seqlens.numel() - 1:
            if rows == int(cu_seqlens[-1]) and bool((cu_seqlens.diff() != 1).any()):
                raise FisherCaptureError(
                    f"{ctx.head.name}: its {rows} rows may be the tokens or the samples, as there are empty samples; "
                    "leave those out"
                )
            x, grad_y, cu_seqlens = x.flatten(0, -2), grad_y.flatten(0, -2), None  # behind a pooling: a row a sample
        x_n, grad_y_n = (as_batch(t, cu_seqlens) for t in (x, grad_y))
        ctx.taker._count(ctx.head, x_n)
        with use_backend(ctx.backend):
            ctx.taker._head_backward(ctx.head, x_n, grad_y_n, cu_seqlens)
        grad_x = None
        if ctx.needs_input_grad[0]:
            with torch.autocast(grad_y.device.type, enabled=False):
                grad_x = (grad_y @ weight.to(grad_y.dtype)).to(ctx.x_dtype).view(ctx.x_shape)
        return grad_x, None, None, None, None


def _refuse(name: str) -> Any:
    def hook(grad: Tensor | None) -> None:
        if grad is not None:
            raise past_its_module(name, "clipped")

    return hook


def accumulate(parameter: Tensor, value: Tensor) -> None:
    """As a backward does: into the gradient that is there, if any."""
    value = value.to(parameter.dtype)
    if parameter.grad is None:
        parameter.grad = value.contiguous()
    else:
        parameter.grad.add_(value)


def checked_number(name: str, value: float, positive: bool = False) -> float:
    """A finite number ≥ 0 (``positive``: > 0) as a float. Raises TypeError or ValueError, naming it, for another."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: {type(value).__name__}, wanted a number")
    number = float(value) if abs(value) < 1e300 else math.inf
    if not (0.0 < number < math.inf if positive else 0.0 <= number < math.inf):
        raise ValueError(f"{name}: {value!r:.40}, wanted a finite number {'>' if positive else '≥'} 0")
    return number
