"""score_samples: how hard each sample of a data set is, by its Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adapter import layers_of
from .backward import past_its_module
from .capture import capture_fisher
from .lora import lora_pairs
from .losses import TASKS, SampleLoss, Task, TaskName, own_losses, task_of
from .sample_axis import check_sample_axis, few_of
from .tree import evaluating


class NotFiniteScoresError(FloatingPointError, ValueError):
    """Scores that are not finite; ``samples``: whose they are."""

    def __init__(self, where: str, what: str, samples: list[int]) -> None:
        some = ", ".join(map(str, samples[:5])) + (", …" if len(samples) > 5 else "")
        super().__init__(f"{where}: the score of {what} {some} is not finite, wanted finite")
        self.samples = samples


class SampleScores(NamedTuple):
    """scores: float32 (n,) in the loader's order. order: int64 (n,), easy (low score) first, ties in the loader's
    order. diagonal: {LoRA parameter name: Σ_n g_n²}, float32, over the whole data set. module_scores: {LoRA module
    name: float32 (n,)}, each module's part of the scores, which they add up to."""

    scores: Tensor
    order: Tensor
    diagonal: dict[str, Tensor]
    module_scores: dict[str, Tensor]

    def layer_scores(self) -> dict[int | None, Tensor]:
        """{transformer block: float32 (n,)}, each block's part of the scores; None: modules outside of all blocks.

        Raises ValueError where a model has several stacks of blocks, whose numbers would fall together.
        """
        layer_of, layers = layers_of([f"{name}." for name in self.module_scores]), dict[int | None, Tensor]()
        for name, part in self.module_scores.items():
            layer = layer_of[f"{name}."]
            layers[layer] = layers[layer] + part if layer in layers else part.clone()
        return layers


def score_samples(
    model: nn.Module,
    loader: Iterable[Mapping[str, Tensor]],
    *,
    sample_loss: TaskName | SampleLoss = "classification",
    labels: str = "data",
    draws: int = 1,
    generator: torch.Generator | None = None,
    on_batch: Callable[[int], None] | None = None,
    allow_frozen: bool = False,
) -> SampleScores:
    """Fisher score f_i = Σ_p (∂ log p(y_i | x_i) / ∂p)² of every sample, p over the LoRA parameters.

    The model is scored as it is used: in eval mode (dropout off; the mode is put back). ``.grad`` of its parameters is
    not touched, and no gradient of the head or the base model is computed. Batches of samples of like length waste no
    time on padding: :func:`fibecfed.batches.length_buckets` makes them.

    Args:
        model: a PEFT model with LoRA. loader: batches as dicts of tensors, on the model's device.
        sample_loss: "classification", "regression", "causal_lm", "token_classification" (see :mod:`fibecfed.losses`),
            or a function (model, batch) → the samples' own losses (N,).
        labels: "data" (empirical Fisher, the paper's) or "model" (drawn from p(y | x): the true Fisher) [ours].
        draws: with labels="model", how many label sets are drawn and averaged over, ≥ 1: the true Fisher score is the
            expectation over y, and its error falls with 1/√draws.
        generator: CPU generator for labels="model". on_batch: called with the number of samples after each batch.
        allow_frozen: as for :class:`capture_fisher`.

    On a few samples of the first batch it is seen that a sample's loss reaches its own place in every module alone, see
    :func:`fibecfed.check_sample_axis`.

    Raises as :class:`capture_fisher` and :func:`fibecfed.check_sample_axis`; FisherCaptureError for a loss that reads a
    LoRA weight past its module; ValueError, naming the argument, for an empty loader, losses of a wrong shape, an
    unknown task, labels="model" with a loss of your own, or draws that do not fit; at the end
    NotFiniteScoresError.
    """
    loss_of, draw = _task(sample_loss, labels, draws)
    if isinstance(loader, (Mapping, Tensor, str)) or not isinstance(loader, Iterable):
        raise TypeError(f"loader: {type(loader).__name__}, wanted batches one by one: a list or a DataLoader")
    weights: dict[str, Tensor] = {}
    for pair in lora_pairs(model, allow_frozen):
        weights |= pair.trained
    scores: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {}
    diagonal: dict[str, Tensor] = {}
    checked = False
    with evaluating(model):
        for given in loader:
            if not isinstance(given, Mapping):
                raise TypeError(f"loader: gave a batch that is a {type(given).__name__}, wanted a dict of tensors")
            if any(isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == 0 for v in given.values()):
                raise ValueError("loader: gave a batch without samples, wanted at least one in each")
            found = []
            for _ in range(draws):
                batch = given if draw is None else {**given, "labels": draw(model, given, generator)}
                found.append(_scored(model, batch, loss_of, weights, allow_frozen))
            scores.append(_mean([fisher.scores for fisher in found]))
            if not checked and len(scores[-1]) > 1:
                few = few_of(batch, len(scores[-1]))
                checked = check_sample_axis(model, few, loss_of) or check_sample_axis(model, batch, loss_of)
            for name in found[0].module_scores:
                parts.setdefault(name, []).append(_mean([fisher.module_scores[name] for fisher in found]))
            for name in found[0].diagonal:
                value = _mean([fisher.diagonal[name] for fisher in found])
                diagonal[name] = diagonal[name].add_(value) if name in diagonal else value
            if on_batch is not None:
                on_batch(len(scores[-1]))
    if not scores:
        raise ValueError("loader: gave no batch")
    joined = torch.cat(scores)
    if not bool(joined.isfinite().all()):
        bad = joined.isfinite().logical_not().nonzero().flatten().tolist()
        raise NotFiniteScoresError("loader", "sample (in its order)", bad)
    by_module = {name: torch.cat(values) for name, values in parts.items()}
    return SampleScores(joined, torch.argsort(joined, stable=True), diagonal, by_module)


def _task(
    sample_loss: str | SampleLoss, labels: str, draws: int
) -> tuple[SampleLoss, Callable[[nn.Module, Mapping[str, Tensor], torch.Generator | None], Tensor] | None]:
    """The loss, and the way to draw labels if they are the model's."""
    if labels not in ("data", "model"):
        raise ValueError(f"labels: {labels!r}, wanted 'data' or 'model'")
    if not isinstance(draws, Integral) or isinstance(draws, bool):
        raise TypeError(f"draws: {draws!r}, wanted an integer")
    if draws < 1 or (labels == "data" and draws != 1):
        raise ValueError(f"draws: {draws}, wanted ≥ 1, and 1 for labels='data', which are not drawn")
    task = task_of(sample_loss)
    if isinstance(task, Task):
        return task.loss, task.draw if labels == "model" else None
    if labels == "model":
        raise ValueError(f"labels: 'model' can be drawn for {', '.join(TASKS)}; sample_loss is a function")
    return task, None


def _scored(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    loss_of: SampleLoss,
    weights: Mapping[str, Tensor],
    allow_frozen: bool,
) -> capture_fisher:
    capture = capture_fisher(model, "sum", weight_grad=False, allow_frozen=allow_frozen)
    with torch.enable_grad(), capture as fisher:
        losses = own_losses(loss_of, model, batch)
        # by autograd.grad, not backward: only what leads to LoRA is computed, and .grad stays what it was
        beside = torch.autograd.grad(losses.sum(), list(weights.values()), allow_unused=True)
    for name, gradient in zip(weights, beside, strict=True):
        if gradient is not None:  # the module's own goes to the kernel
            raise past_its_module(name, "scored")
    if fisher.scores.shape != losses.shape:
        raise ValueError(
            f"sample_loss: {losses.numel()} losses for {fisher.scores.numel()} samples on the first axis of the LoRA "
            "modules' inputs, wanted one each"
        )
    return fisher


def _mean(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)
