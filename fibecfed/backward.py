"""The LoRA backward taken over for one batch: autograd functions that hand (x, h, ∂h, ∂y) of every pair to a consumer.

Consumers are :class:`fibecfed.capture_fisher`, which makes scores, diagonals and the ordinary gradients of them, and
:class:`fibecfed.clip_sample_gradients`, which keeps them until every sample's norm is known.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fibecfed_kernels import backend, use_backend

from .lora import HeadLinear, LoraPair, lora_pairs


class FisherCaptureError(RuntimeError):
    """What was seen during the backward is not what was expected; the message names the module."""


class LoraBackward:
    """Base of the context managers: patches the modules, counts what it sees, and puts everything back.

    Arguments and errors are those of :class:`fibecfed.capture_fisher`. A consumer defines ``_pair_backward``,
    ``_head_backward`` if it lists ``_heads``, and ``_finish``.
    """

    def __init__(
        self,
        model: nn.Module,
        reduction: Literal["mean", "sum"] = "mean",
        *,
        loss_scale: float = 1.0,
        cu_seqlens: Tensor | None = None,
        num_samples: int | None = None,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: {reduction!r}, wanted 'mean' or 'sum'")
        if isinstance(loss_scale, bool) or not isinstance(loss_scale, (int, float)) or not 0.0 < loss_scale < math.inf:
            raise ValueError(f"loss_scale: {loss_scale!r}, wanted a number with 0 < loss_scale < ∞")
        if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"cu_seqlens: {type(cu_seqlens).__name__}, wanted an int32 tensor (N+1,)")
        if num_samples is not None and (isinstance(num_samples, bool) or not isinstance(num_samples, int)):
            raise TypeError(f"num_samples: {type(num_samples).__name__}, wanted an integer")
        self.model = model
        self.reduction = reduction
        self.loss_scale = loss_scale
        self.cu_seqlens = cu_seqlens
        self.num_samples = num_samples
        self._pairs: list[LoraPair] = []
        self._heads: list[HeadLinear] = []
        self._counts: dict[LoraPair | HeadLinear, int] = {}

    def __enter__(self) -> Self:
        if torch.is_inference_mode_enabled():
            raise FisherCaptureError(f"{self._what}: inference mode is on, in which nothing has a gradient")
        self._pairs = lora_pairs(self.model)
        self._heads = self._find_heads()
        if any("forward" in linear.__dict__ for linear in self._linears()):
            raise FisherCaptureError(f"{self._what}: blocks cannot be nested")
        self._counts = {}
        for pair in self._pairs:
            stash: dict[str, Tensor] = {}
            # an instance attribute, so that forward hooks, names and state_dict of the modules stay what they are
            pair.a.forward = self._forward_a(pair, stash)  # type: ignore[method-assign]
            pair.b.forward = self._forward_b(pair, stash)  # type: ignore[method-assign]
        for head in self._heads:
            head.linear.forward = self._forward_head(head)  # type: ignore[method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for linear in self._linears():
            del linear.forward
        if kind is None:
            samples = self._check_counts()
            # ∂(mean loss) is 1/N of the sample's own gradient, and a loss scale S makes it S times as large
            self._finish((samples if self.reduction == "mean" else 1) / self.loss_scale)

    def _find_heads(self) -> list[HeadLinear]:
        return []

    def _pair_backward(
        self, pair: LoraPair, x: Tensor, h: Tensor, grad_h: Tensor, grad_y: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Takes a pair's tensors, (N, T, features) or packed; returns the gradients of A and B, if it has them."""
        raise NotImplementedError

    def _head_backward(self, head: HeadLinear, x: Tensor, grad_y: Tensor, cu_seqlens: Tensor | None) -> None:
        """Takes a trainable linear's tensors; in a packed batch they may be packed too, or one row a sample."""
        raise NotImplementedError

    def _finish(self, scale: float) -> None:
        """All modules were seen; a sample's own gradient is ``scale`` times what the backward saw."""
        raise NotImplementedError

    @property
    def _what(self) -> str:
        return type(self).__name__

    def _linears(self) -> list[nn.Linear]:
        return [linear for pair in self._pairs for linear in (pair.a, pair.b)] + [head.linear for head in self._heads]

    def _forward_a(self, pair: LoraPair, stash: dict[str, Tensor]) -> Any:
        return lambda x: _LoraA.apply(x, pair.a.weight, pair.b.weight, self, pair, stash)

    def _forward_b(self, pair: LoraPair, stash: dict[str, Tensor]) -> Any:
        return lambda h: _LoraB.apply(h, pair.b.weight.detach(), stash)

    def _forward_head(self, head: HeadLinear) -> Any:
        return lambda x: _Head.apply(x, head.linear.weight, head.linear.bias, self, head)

    def _count(self, module: LoraPair | HeadLinear, x: Tensor) -> None:
        if module in self._counts:
            raise FisherCaptureError(
                f"{module.name}: seen twice in one {self._what} block (used twice in one forward, or two backward "
                "passes); its gradients must be summed before squaring, which one block cannot do"
            )
        self._counts[module] = x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def _check_counts(self) -> int:
        """The number of samples, which all modules agree on."""
        for kind, modules in (("LoRA", self._pairs), ("trainable linear", self._heads)):
            missing = [module.name for module in modules if module not in self._counts]
            if missing:
                raise FisherCaptureError(
                    f"{len(missing)} of {len(modules)} {kind} modules had no backward in the {self._what} block, the "
                    f"first is {missing[0]}: run forward and backward inside the block, through every module"
                )
        first, samples = next((module.name, count) for module, count in self._counts.items())
        for module, count in self._counts.items():
            if count != samples:
                raise FisherCaptureError(f"{module.name}: saw {count} samples where {first} saw {samples}")
        if self.num_samples is not None and samples != self.num_samples:
            raise FisherCaptureError(
                f"{first}: saw {samples} samples, wanted {self.num_samples} (num_samples); a module's "
                "input must have the samples on its first axis"
            )
        return samples


def _as_batch(tensor: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(N, T, d) from a module's tensor: (N, d) is one token a sample; with cu_seqlens (total, d)."""
    if cu_seqlens is not None:
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


def _backend_of(x: Tensor) -> Any:
    """The body asked for where the forward ran: the backward may run on autograd's own thread, which knows no `with`
    of ours."""
    return backend(x.device) if not torch.is_inference_mode_enabled() else None


class _LoraB(torch.autograd.Function):
    """y = h Bᵀ. The backward hands ∂y and h to A's backward, which runs next and gives B its gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, b: Tensor, stash: dict[str, Tensor]) -> Tensor:
        y = F.linear(h, b)  # under autocast this casts, and y's dtype tells to what
        ctx.save_for_backward(h, b)
        ctx.stash = stash
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        h, b = ctx.saved_tensors
        ctx.stash["h"], ctx.stash["grad_y"] = h, grad_y
        b = b.to(grad_y.dtype).t()
        if not grad_y.is_cuda:
            b = b.contiguous()  # on the CPU this product of few columns is a third faster so
        with torch.autocast(grad_y.device.type, enabled=False):
            return F.linear(grad_y, b).to(h.dtype), None, None


class _LoraA(torch.autograd.Function):
    """h = x Aᵀ. B's weight is an input too, so that its gradient leaves through the node where the kernel runs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, taker: LoraBackward, pair: LoraPair, stash: dict[str, Tensor]
    ) -> Tensor:
        h = F.linear(x, a)
        # autograd keeps what the product read: x in h's dtype
        ctx.save_for_backward(x.to(h.dtype), a)
        ctx.taker, ctx.pair, ctx.stash, ctx.x_dtype, ctx.backend = taker, pair, stash, x.dtype, _backend_of(x)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, a = ctx.saved_tensors
        taker, stash = ctx.taker, ctx.stash
        if "grad_y" not in stash:
            raise FisherCaptureError(f"{ctx.pair.name}: A's output did not go into B alone")
        h, grad_y = stash.pop("h"), stash.pop("grad_y")
        x_n, h_n, grad_h_n, grad_y_n = (_as_batch(t.to(x.dtype), taker.cu_seqlens) for t in (x, h, grad_h, grad_y))
        taker._count(ctx.pair, x_n)
        with use_backend(ctx.backend):
            grad_a, grad_b = taker._pair_backward(ctx.pair, x_n, h_n, grad_h_n, grad_y_n)
        grad_x = None
        if ctx.needs_input_grad[0]:
            with torch.autocast(grad_h.device.type, enabled=False):
                grad_x = (grad_h.to(x.dtype) @ a.to(x.dtype)).to(ctx.x_dtype)
        return grad_x, grad_a, grad_b, None, None, None


class _Head(torch.autograd.Function):
    """y = x Wᵀ + b of a trainable linear module outside LoRA. W and b are inputs, so that y has a gradient without x's
    having one; theirs are the taker's to make."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, taker: LoraBackward, head: HeadLinear
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        ctx.save_for_backward(x.to(y.dtype), weight)
        ctx.taker, ctx.head, ctx.x_dtype, ctx.x_shape, ctx.backend = taker, head, x.dtype, x.shape, _backend_of(x)
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
        x_n, grad_y_n = (_as_batch(t, cu_seqlens) for t in (x, grad_y))
        ctx.taker._count(ctx.head, x_n)
        with use_backend(ctx.backend):
            ctx.taker._head_backward(ctx.head, x_n, grad_y_n, cu_seqlens)
        grad_x = None
        if ctx.needs_input_grad[0]:
            with torch.autocast(grad_y.device.type, enabled=False):
                grad_x = (grad_y @ weight.to(grad_y.dtype)).to(ctx.x_dtype).view(ctx.x_shape)
        return grad_x, None, None, None, None
