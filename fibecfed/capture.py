"""capture_fisher: per-sample Fisher information out of the ordinary backward pass.

Inside the block every LoRA pair's A and B run through autograd functions that keep (x, h) and see (∂h, ∂y). When the
backward reaches A, one kernel call gives both matrices' scores, diagonals and ordinary weight gradients.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fibecfed_kernels import LoraFisherDiag, backend, lora_fisher_diag, use_backend

from .lora import LoraPair, lora_pairs


class FisherCaptureError(RuntimeError):
    """What was seen during the backward is not what was expected; the message names the module."""


class capture_fisher:
    """Context manager: Fisher scores and diagonal of the LoRA parameters from the backward run inside it.

    Usage::

        with capture_fisher(model) as fisher:
            model(**batch).loss.backward()
        fisher.scores, fisher.diagonal

    With g_n the gradient of sample n's own loss by all LoRA parameters: ``scores[n] = ‖g_n‖²`` (N,), the trace of that
    sample's empirical Fisher diagonal, ``module_scores[module]`` (N,) its parts, and ``diagonal[name] = Σ_n g_n²`` in
    the parameter's shape, all float32. The
    ordinary gradients (``.grad``) are made by the same kernel and are what they would be without the block; so is the
    loss. Task heads and other trainable parameters get their gradients but are not scored.

    Args:
        model: a PEFT model with LoRA on nn.Linear modules.
        reduction: how the loss was made of the samples' losses: "mean" (over the N samples) or "sum". A mean over
            anything else (tokens, samples that are not ignored, outputs of a regression) is a sum with a factor:
            reduction="sum", loss_scale=1/(number of them). What the loss is cannot be seen from here.
        loss_scale: any other factor on the loss, e.g. ``GradScaler.get_scale()``, or 1/k where gradients of k batches
            are accumulated; removed from scores and diagonal, not from .grad.
        cu_seqlens: int32 (N+1,) for packed batches, whose module inputs are (1, total, d) or (total, d).
        num_samples: N, if it is to be checked: a model that flattens samples and tokens into one axis before a module
            would give scores of tokens.
        weight_grad: False leaves ``.grad`` of the LoRA parameters untouched.

    Forward AND backward of one batch belong inside the block, once. Right under autocast, gradient checkpointing,
    dropout, rsLoRA, bf16 models, padding on either side. A module's input must have the samples on its first axis.
    Results are there when the block ends.

    Raises:
        UnsupportedModuleError: on entry, see :func:`fibecfed.lora.lora_pairs`.
        FisherCaptureError: a module was seen never, or twice (used twice in one forward, or two backward passes),
            or with another number of samples than the others or than ``num_samples``; or inference mode is on.

    Source: step 1 of FibecFed (Liu et al., EMNLP 2024, arXiv 2410.00131).
    """

    def __init__(
        self,
        model: nn.Module,
        reduction: Literal["mean", "sum"] = "mean",
        *,
        loss_scale: float = 1.0,
        cu_seqlens: Tensor | None = None,
        weight_grad: bool = True,
        num_samples: int | None = None,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: {reduction!r}, wanted 'mean' or 'sum'")
        if not isinstance(loss_scale, (int, float)) or not 0.0 < loss_scale < math.inf:
            raise ValueError(f"loss_scale: {loss_scale!r}, wanted a number with 0 < loss_scale < ∞")
        if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"cu_seqlens: {type(cu_seqlens).__name__}, wanted an int32 tensor (N+1,)")
        self.model = model
        self.reduction = reduction
        self.loss_scale = loss_scale
        self.cu_seqlens = cu_seqlens
        self.weight_grad = weight_grad
        self.num_samples = num_samples
        self._pairs: list[LoraPair] = []
        self._seen: dict[LoraPair, LoraFisherDiag] = {}
        self._scores: Tensor | None = None
        self._module_scores: dict[str, Tensor] = {}
        self._diagonal: dict[str, Tensor] | None = None

    @property
    def scores(self) -> Tensor:
        """float32 (N,): ‖g_n‖², in the order of the batch."""
        if self._scores is None:
            raise FisherCaptureError("scores: not there yet; they are ready when the capture_fisher block has ended")
        return self._scores

    @property
    def module_scores(self) -> dict[str, Tensor]:
        """{LoRA module name: float32 (N,)}: the part of ``scores`` that comes from its A and B."""
        _ = self.scores  # says that it is too early
        return self._module_scores

    @property
    def diagonal(self) -> dict[str, Tensor]:
        """{parameter name: Σ_n g_n²}, float32, in the parameter's shape."""
        if self._diagonal is None:
            raise FisherCaptureError("diagonal: not there yet; it is ready when the capture_fisher block has ended")
        return self._diagonal

    def __enter__(self) -> capture_fisher:
        if torch.is_inference_mode_enabled():
            raise FisherCaptureError("capture_fisher: inference mode is on, in which nothing has a gradient")
        self._pairs = lora_pairs(self.model)
        if any("forward" in linear.__dict__ for pair in self._pairs for linear in (pair.a, pair.b)):
            raise FisherCaptureError("capture_fisher: blocks cannot be nested")
        self._seen, self._scores, self._diagonal = {}, None, None
        for pair in self._pairs:
            stash: dict[str, Tensor] = {}
            # an instance attribute, so that forward hooks, names and state_dict of the modules stay what they are
            pair.a.forward = self._forward_a(pair, stash)  # type: ignore[method-assign]
            pair.b.forward = self._forward_b(pair, stash)  # type: ignore[method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pair in self._pairs:
            del pair.a.forward, pair.b.forward
        if kind is None:
            self._finish()

    def _forward_a(self, pair: LoraPair, stash: dict[str, Tensor]) -> Any:
        return lambda x: _LoraA.apply(x, pair.a.weight, pair.b.weight, self, pair, stash)

    def _forward_b(self, pair: LoraPair, stash: dict[str, Tensor]) -> Any:
        return lambda h: _LoraB.apply(h, pair.b.weight.detach(), stash)

    def _add(self, pair: LoraPair, found: LoraFisherDiag) -> None:
        if pair in self._seen:
            raise FisherCaptureError(
                f"{pair.name}: seen twice in one capture_fisher block (used twice in one forward, or two backward "
                "passes); its gradients must be summed before squaring, which one block cannot do"
            )
        self._seen[pair] = found

    def _finish(self) -> None:
        missing = [pair.name for pair in self._pairs if pair not in self._seen]
        if missing:
            raise FisherCaptureError(
                f"{len(missing)} of {len(self._pairs)} LoRA modules had no backward in the capture_fisher block, the "
                f"first is {missing[0]}: run forward and backward inside the block, through every module"
            )
        counts = {pair.name: self._seen[pair].a.scores.numel() for pair in self._pairs}
        samples = counts[self._pairs[0].name]
        odd = next((name for name, count in counts.items() if count != samples), None)
        if odd is not None:
            raise FisherCaptureError(f"{odd}: saw {counts[odd]} samples where {self._pairs[0].name} saw {samples}")
        if self.num_samples is not None and samples != self.num_samples:
            raise FisherCaptureError(
                f"{self._pairs[0].name}: saw {samples} samples, wanted {self.num_samples} (num_samples); a module's "
                "input must have the samples on its first axis"
            )
        # ∂(mean loss) is 1/N of the sample's own gradient, so squares want N² back; a loss scale S wants 1/S².
        factor = ((samples if self.reduction == "mean" else 1) / self.loss_scale) ** 2
        found = [self._seen[pair] for pair in self._pairs]
        parts = torch.stack([part.scores for f in found for part in f]) * factor
        self._scores = parts.sum(0)
        self._module_scores = {}
        for pair, part in zip(self._pairs, parts.view(len(found), 2, -1).sum(1), strict=True):
            known = self._module_scores.get(pair.name)  # several adapters of one module add up
            self._module_scores[pair.name] = part if known is None else known + part
        self._diagonal = {}
        for pair, f in zip(self._pairs, found, strict=True):
            self._diagonal[pair.a_name] = f.a.diag.mul_(factor)
            self._diagonal[pair.b_name] = f.b.diag.mul_(factor)
        self._seen = {}


def _as_batch(tensor: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(N, T, d) from a module's tensor: (N, d) is one token a sample; with cu_seqlens (total, d)."""
    if cu_seqlens is not None:
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


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
        with torch.autocast(grad_y.device.type, enabled=False):
            return (grad_y @ b.to(grad_y.dtype)).to(h.dtype), None, None


class _LoraA(torch.autograd.Function):
    """h = x Aᵀ. B's weight is an input too, so that its gradient leaves through the node where the kernel runs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, capture: capture_fisher, pair: LoraPair, stash: dict[str, Tensor]
    ) -> Tensor:
        h = F.linear(x, a)
        # autograd keeps what the product read: x in h's dtype
        ctx.save_for_backward(x.to(h.dtype), a)
        ctx.capture, ctx.pair, ctx.stash, ctx.x_dtype = capture, pair, stash, x.dtype
        ctx.backend = backend(x.device) if not torch.is_inference_mode_enabled() else None
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, a = ctx.saved_tensors
        capture, stash = ctx.capture, ctx.stash
        if "grad_y" not in stash:
            raise FisherCaptureError(f"{ctx.pair.name}: A's output did not go into B alone")
        h, grad_y = stash.pop("h"), stash.pop("grad_y")
        x_n, h_n, grad_h_n, grad_y_n = (_as_batch(t.to(x.dtype), capture.cu_seqlens) for t in (x, h, grad_h, grad_y))
        with use_backend(ctx.backend):  # the backward may run on autograd's own thread, which knows no `with` of ours
            found = lora_fisher_diag(x_n, h_n, grad_h_n, grad_y_n, capture.cu_seqlens, weight_grad=capture.weight_grad)
        capture._add(ctx.pair, found)
        grad_x = None
        if ctx.needs_input_grad[0]:
            with torch.autocast(grad_h.device.type, enabled=False):
                grad_x = (grad_h.to(x.dtype) @ a.to(x.dtype)).to(ctx.x_dtype)
        return grad_x, found.a.weight_grad, found.b.weight_grad, None, None, None
