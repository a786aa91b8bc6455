"""score_samples: how hard each sample of a data set is, by its Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capture import capture_fisher
from .lora import lora_pairs

SampleLoss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


class SampleScores(NamedTuple):
    """scores: float32 (n,) in the loader's order. order: int64 (n,), easy (low score) first, ties in the loader's
    order. diagonal: {LoRA parameter name: Σ_n g_n²}, float32, over the whole data set."""

    scores: Tensor
    order: Tensor
    diagonal: dict[str, Tensor]


def classification_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of each sample, (N,), by the logits (N, classes) and ``batch["labels"]``."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    labels = batch["labels"]
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"logits {tuple(logits.shape)}, labels {labels.dtype} {tuple(labels.shape)}: wanted (N, classes) and "
            "integers (N,); pass sample_loss for another task"
        )
    return F.cross_entropy(logits.float(), labels, reduction="none")


def model_labels(model: nn.Module, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
    """Labels (N,) drawn from the model's own p(y | x): with them the scores are of the "true" Fisher information
    [ours]."""
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator).squeeze(1).to(logits.device)


def score_samples(
    model: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    *,
    sample_loss: SampleLoss = classification_loss,
    labels: str = "data",
    generator: torch.Generator | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> SampleScores:
    """Fisher score f_i = Σ_p (∂ log p(y_i | x_i) / ∂p)² of every sample, p over the LoRA parameters.

    The model is scored as it is used: in eval mode (dropout off; the mode is put back). ``.grad`` of its parameters is
    not touched, and no gradient of the head or the base model is computed.

    Args:
        model: a PEFT model with LoRA. loader: batches as dicts of tensors, on the model's device.
        sample_loss: (model, batch) → the samples' own losses (N,); default: cross-entropy of a classifier.
        labels: "data" (empirical Fisher, the paper's) or "model" (labels drawn from p(y | x), the true Fisher).
        generator: CPU generator for labels="model". on_batch: called with the number of samples after each batch.

    Raises as :class:`capture_fisher`; ValueError for an empty loader or losses of a wrong shape.
    """
    if labels not in ("data", "model"):
        raise ValueError(f"labels: {labels!r}, wanted 'data' or 'model'")
    weights = [w for pair in lora_pairs(model) for w in (pair.a.weight, pair.b.weight)]
    training = [module for module in model.modules() if module.training]
    model.eval()
    scores: list[Tensor] = []
    diagonal: dict[str, Tensor] = {}
    try:
        for batch in loader:
            if labels == "model":
                batch = {**batch, "labels": model_labels(model, batch, generator)}
            with torch.enable_grad(), capture_fisher(model, "sum", weight_grad=False) as fisher:
                losses = sample_loss(model, batch)
                if losses.dim() != 1:
                    raise ValueError(f"sample_loss: gave shape {tuple(losses.shape)}, wanted (N,)")
                # by autograd.grad, not backward: only what leads to LoRA is computed, and .grad stays what it was
                torch.autograd.grad(losses.sum(), weights, allow_unused=True)
            if fisher.scores.shape != losses.shape:
                raise ValueError(f"sample_loss: {losses.numel()} losses for {fisher.scores.numel()} samples")
            scores.append(fisher.scores)
            for name, value in fisher.diagonal.items():
                diagonal[name] = diagonal[name].add_(value) if name in diagonal else value
            if on_batch is not None:
                on_batch(len(losses))
    finally:
        for module in training:
            module.training = True
    if not scores:
        raise ValueError("loader: gave no batch")
    joined = torch.cat(scores)
    return SampleScores(joined, torch.argsort(joined, stable=True), diagonal)
