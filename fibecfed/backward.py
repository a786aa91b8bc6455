"""The LoRA backward taken over for one batch: autograd functions that hand (x, h, ∂h, ∂y) of every pair to a consumer.

Consumers are :class:`fibecfed.capture_fisher`, which makes scores, diagonals and the ordinary gradients of them, and
:class:`fibecfed.clip_sample_gradients`, which keeps them until every sample's norm is known.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Integral, Real
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fibecfed_kernels import backend, use_backend

from .lora import HeadLinear, LoraPair, UnsupportedModuleError, check_unmixed, lora_pairs
from .sharing import Found, Seen, SharedInputs
from .watching import ForwardWatch

Forward = Callable[[Tensor], Tensor]
SMALLEST_SCALE = 1e-9  # of a loss; the squares of what smaller ones leave of a gradient fall out of float32's range


class FisherCaptureError(RuntimeError):
    """What was seen during the backward is not what was expected; the message names the module."""


def past_its_module(name: str, what: str) -> FisherCaptureError:
    """The refusal of a weight that also has a gradient from elsewhere, so that the parameter cannot be ``what``."""
    return FisherCaptureError(
        f"{name}: has a gradient past its module (the loss reads the weight itself, or a function does), which cannot "
        f"be {what} by sample"
    )


class LoraBackward(ABC):
    """Base of the context managers: patches the modules, counts what it sees, and puts everything back.

    Arguments and errors are those of :class:`fibecfed.capture_fisher`. A consumer takes what the kernel found of each
    pair (``_take``) and makes its results at the end (``_finish``); one that wants the pairs' gradients in the backward
    itself, or other modules than LoRA's, overrides ``_pair_backward``, or ``_find_heads`` and ``_patches``.
    """

    _allow_frozen = True  # what is not trained has no gradient that could be missing

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
        number = isinstance(loss_scale, Real) and not isinstance(loss_scale, bool)
        if not number or not SMALLEST_SCALE <= loss_scale < math.inf:
            raise ValueError(f"loss_scale: {loss_scale!r}, wanted a number with {SMALLEST_SCALE} ≤ loss_scale < ∞")
        if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"cu_seqlens: {type(cu_seqlens).__name__}, wanted an int32 tensor (N+1,)")
        if num_samples is not None and (isinstance(num_samples, bool) or not isinstance(num_samples, Integral)):
            raise TypeError(f"num_samples: {type(num_samples).__name__}, wanted an integer")
        self.model = model
        self.reduction = reduction
        self.loss_scale = loss_scale
        self.cu_seqlens = cu_seqlens
        self.num_samples: int | None = num_samples
        self._pairs: list[LoraPair] = []
        self._heads: list[HeadLinear] = []
        self._counts: dict[LoraPair | HeadLinear, int] = {}
        self._patched: dict[nn.Linear, Forward] = {}
        self._watch: ForwardWatch | None = None
        self._tokens: int | None = None  # where cu_seqlens ends
        self._shared = SharedInputs(self._take)

    def __enter__(self) -> Self:
        if torch.is_inference_mode_enabled():
            raise FisherCaptureError(f"{self._what}: inference mode is on, in which nothing has a gradient")
        self._pairs = lora_pairs(self.model, self._allow_frozen)
        check_unmixed(self.model)
        self._heads = self._find_heads()
        self._patched = self._patches()
        self._check_patched()
        self._counts, self._shared = {}, SharedInputs(self._take)
        for linear, forward in self._patched.items():
            # an instance attribute, so that forward hooks, names and state_dict of the modules stay what they are
            linear.forward = _Patch(forward)  # type: ignore[assignment,method-assign]
        self._watch = ForwardWatch(self.model, self._pairs)
        if self.cu_seqlens is not None and self.cu_seqlens.dim() == 1 and len(self.cu_seqlens) > 0:  # else ops say so
            self._tokens = int(self.cu_seqlens[-1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for linear in self._patched:
            del linear.forward
        if self._watch is not None:
            self._watch.remove()
        try:
            if kind is None:
                samples = self._check_counts()
                self._shared.flush()
                # ∂(mean loss) is 1/N of the sample's own gradient, and a loss scale S makes it S times as large
                self._finish((samples if self.reduction == "mean" else 1) / self.loss_scale)
        finally:
            self._shared = SharedInputs(self._take)  # lets go of what an error left open

    @abstractmethod
    def _take(self, seen: Seen, found: Found) -> None:
        """What the kernel found of a pair; called for each pair before ``_finish``."""

    @abstractmethod
    def _finish(self, scale: float) -> None:
        """All modules were seen; a sample's own gradient is ``scale`` times what the backward saw."""

    def _pair_backward(self, seen: Seen) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of A and B, if they are to leave through autograd: here none, so pairs may share a launch."""
        self._shared.add(seen, backend(seen.x.device), self.cu_seqlens)
        return None, None

    def _find_heads(self) -> list[HeadLinear]:
        """Modules beside LoRA's that are to be seen as well."""
        return []

    def _patches(self) -> dict[nn.Linear, Forward]:
        """The forward that each module gets inside the block."""
        patches: dict[nn.Linear, Forward] = {}
        for pair in self._pairs:
            stash: dict[str, Tensor] = {}
            patches[pair.a] = self._forward_a(pair, stash)
            patches[pair.b] = self._forward_b(pair, stash)
        return patches

    @property
    def _what(self) -> str:
        return type(self).__name__

    def _forward_a(self, pair: LoraPair, stash: dict[str, Tensor]) -> Forward:
        return lambda x: _LoraA.apply(x, pair.a.weight, pair.b.weight, self, pair, stash)

    def _forward_b(self, pair: LoraPair, stash: dict[str, Tensor]) -> Forward:
        return lambda h: _LoraB.apply(h, pair.b.weight.detach(), stash)

    def _check_patched(self) -> None:
        for linear in self._patched:
            if (forward := linear.__dict__.get("forward")) is None:
                continue
            if isinstance(forward, _Patch):
                raise FisherCaptureError(f"{self._what}: blocks cannot be nested")
            name = next(name for name, module in self.model.named_modules() if module is linear)
            raise UnsupportedModuleError(
                f"{name}: its forward was replaced (accelerate's hooks do that, and patches), wanted nn.Linear's own"
            )

    def _count(self, module: LoraPair | HeadLinear, x: Tensor) -> None:
        if module in self._counts:
            raise FisherCaptureError(
                f"{module.name}: seen twice in one {self._what} block (used twice in one forward, or two backward "
                "passes); its gradients must be summed before squaring, which one block cannot do: a block for each "
                "backward pass, and no adapter on a module that one forward uses twice (exclude_modules)"
            )
        self._counts[module] = x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def _check_counts(self) -> int:
        """The number of samples, which all modules agree on."""
        assert self._watch is not None
        if self._watch.mixed:
            raise FisherCaptureError(
                f"{self._watch.mixed}: adapter_names, an adapter for each sample, is not supported"
            )
        for kind, modules in (("LoRA", self._pairs), ("trainable linear", self._heads)):
            missing = [module.name for module in modules if module not in self._counts]
            if missing:
                raise FisherCaptureError(
                    f"{len(missing)} of {len(modules)} {kind} modules had no backward in the {self._what} block, the "
                    f"first is {missing[0]}: run forward and backward inside the block, through every module; what the "
                    "model never uses wants no adapter (exclude_modules)"
                )
        first, samples = next((module.name, count) for module, count in self._counts.items())
        for module, count in self._counts.items():
            if count != samples:
                raise FisherCaptureError(
                    f"{module.name}: saw {count} samples where {first} saw {samples}; one of them has not the samples "
                    "on its input's first axis, and wants no adapter (exclude_modules)"
                )
        wanted, whose = self.num_samples, "num_samples"
        if wanted is None and self.cu_seqlens is None:
            wanted, whose = self._watch.samples, "the first axis of the model's input; num_samples says another number"
            if wanted is None:
                raise FisherCaptureError(
                    f"{self._what}: the number of samples cannot be seen, since the model was not called, or without a "
                    "tensor; wanted num_samples"
                )
        if wanted is not None and samples != wanted:
            raise FisherCaptureError(
                f"{first}: saw {samples} samples, wanted {wanted} ({whose}); a module's input must have the samples on "
                "its first axis"
            )
        return samples


class _Patch:
    """The forward of a module inside a block."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        return self._forward(x)

    def __deepcopy__(self, memo: Any) -> _Patch:
        # the copy would keep it, and go on computing with the original's weights
        raise FisherCaptureError("copied inside a block (copy.deepcopy): copy the model before or after it")


def as_batch(tensor: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(N, T, d) from a module's tensor: (N, d) is one token a sample; with cu_seqlens (total, d)."""
    if cu_seqlens is not None:
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


def backend_of(x: Tensor) -> Any:
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
            b = b.contiguous()  # faster on the CPU, where the product has few columns
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
        ctx.taker, ctx.pair, ctx.stash, ctx.x_dtype, ctx.backend = taker, pair, stash, x.dtype, backend_of(x)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, a = ctx.saved_tensors
        taker, stash = ctx.taker, ctx.stash
        if "grad_y" not in stash:
            raise FisherCaptureError(f"{ctx.pair.name}: A's output did not go into B alone")
        if x.dim() < 2:
            raise FisherCaptureError(f"{ctx.pair.name}: its input is {tuple(x.shape)}, wanted the samples on an axis")
        h, grad_y = stash.pop("h"), stash.pop("grad_y")
        x_n, h_n, grad_h_n, grad_y_n = (as_batch(t.to(x.dtype), taker.cu_seqlens) for t in (x, h, grad_h, grad_y))
        if taker._tokens not in (None, len(x_n)):
            raise FisherCaptureError(
                f"{ctx.pair.name}: saw {len(x_n)} tokens where cu_seqlens ends at {taker._tokens}; a module behind a "
                "pooling wants no adapter (exclude_modules)"
            )
        taker._count(ctx.pair, x_n)
        with use_backend(ctx.backend):
            grad_a, grad_b = taker._pair_backward(Seen(ctx.pair, x_n, h_n, grad_h_n, grad_y_n))
        grad_x = None
        if ctx.needs_input_grad[0]:
            with torch.autocast(grad_h.device.type, enabled=False):
                grad_x = (grad_h.to(x.dtype) @ a.to(x.dtype)).to(ctx.x_dtype)
        return grad_x, grad_a, grad_b, None, None, None
