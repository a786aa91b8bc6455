"""capture_fisher: per-sample Fisher information out of the ordinary backward pass.

When the backward reaches a LoRA pair's A, one kernel call gives both matrices' scores, diagonals and ordinary weight
gradients.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .backward import FisherCaptureError, LoraBackward
from .lora import LoraPair
from .sharing import Found, Seen, fisher_of

__all__ = ["FisherCaptureError", "capture_fisher"]


class capture_fisher(LoraBackward):
    """Context manager: Fisher scores and diagonal of the LoRA parameters from the backward run inside it.

    Usage::

        with capture_fisher(model) as fisher:
            model(**batch).loss.backward()
        fisher.scores, fisher.diagonal

    With g_n the gradient of sample n's own loss by all LoRA parameters: ``scores[n] = ‖g_n‖²`` (N,), the trace of that
    sample's empirical Fisher diagonal, ``module_scores[module]`` (N,) its parts, and ``diagonal[name] = Σ_n g_n²`` in
    the parameter's shape, all float32; names are those that the model has without wrappers (torch.compile,
    DistributedDataParallel). The ordinary gradients (``.grad``) are made by the same kernel and are what they would be
    without the block; so is the loss. Task heads and other trainable parameters get their gradients but are not scored.

    Args:
        model: a PEFT model with LoRA on nn.Linear modules.
        reduction: how the loss was made of the samples' losses: "mean" (over the N samples) or "sum". A mean over
            anything else (tokens, samples that are not ignored, outputs of a regression) is a sum with a factor:
            reduction="sum", loss_scale=1/(number of them). What the loss is cannot be seen from here.
        loss_scale: any other factor on the loss, e.g. ``GradScaler.get_scale()``, or 1/k where gradients of k batches
            are accumulated; removed from scores and diagonal, not from .grad. At least 1e-9: below, squares are lost.
        cu_seqlens: int32 (N+1,) for packed batches, whose module inputs are (1, total, d) or (total, d).
        num_samples: N, which what the modules see is compared with: a model that flattens samples and tokens into one
            axis before a module would give scores of tokens. None: the first axis of the model's input. Only the number
            can be seen from here; :func:`fibecfed.check_sample_axis` looks at what is on the axis, too.
        allow_frozen: of a pair A or B may be frozen (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313, trains B alone):
            scores and diagonal are then those of what is trained. False: refused, so that none is missing by mistake.
        weight_grad: False leaves ``.grad`` of the LoRA parameters untouched; modules that read the same input then
            share one launch.

    Forward AND backward of one batch belong inside the block, once. Right under autocast, gradient checkpointing,
    dropout, rsLoRA, bf16 models, padding on either side. A module's input must have the samples on its first axis.
    Results are there when the block ends.

    Raises:
        UnsupportedModuleError: on entry, see :func:`fibecfed.lora.lora_pairs`.
        FisherCaptureError: a module was seen never, or twice (used twice in one forward, or two backward passes),
            or with another number of samples than the others or than ``num_samples``; the forward had
            ``adapter_names``; or inference mode is on.

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
        allow_frozen: bool = False,
    ) -> None:
        super().__init__(model, reduction, loss_scale=loss_scale, cu_seqlens=cu_seqlens, num_samples=num_samples)
        self.weight_grad = weight_grad
        self._allow_frozen = allow_frozen
        self._found: dict[LoraPair, Found] = {}
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
        self._found, self._scores, self._diagonal = {}, None, None
        return super().__enter__()

    def _pair_backward(self, seen: Seen) -> tuple[Tensor | None, Tensor | None]:
        if not self.weight_grad:
            return super()._pair_backward(seen)
        found = fisher_of(seen, self.cu_seqlens, weight_grad=True)
        self._take(seen, found)
        grad_a, grad_b = (None if part is None else part.weight_grad for part in found)
        return grad_a, grad_b

    def _take(self, seen: Seen, found: Found) -> None:
        self._found[seen.pair] = found

    def _finish(self, scale: float) -> None:
        factor = scale**2  # of squares
        found = [self._found[pair] for pair in self._pairs]
        none = next(torch.zeros_like(part.scores) for part in found[0] if part is not None)  # of what is frozen
        parts = torch.stack([none if part is None else part.scores for f in found for part in f]) * factor
        self._scores = parts.sum(0)
        self._module_scores = {}
        for pair, part in zip(self._pairs, parts.view(len(found), 2, -1).sum(1), strict=True):
            known = self._module_scores.get(pair.name)  # several adapters of one module add up
            self._module_scores[pair.name] = part if known is None else known + part
        self._diagonal = {}
        for pair, f in zip(self._pairs, found, strict=True):
            for name, part in ((pair.a_name, f.a), (pair.b_name, f.b)):
                if part is not None:
                    self._diagonal[name] = part.diag.mul_(factor)
        self._found = {}
