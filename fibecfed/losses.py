"""Losses of single samples, −log p(y | x), by task: what a Fisher score is the squared gradient of.

And labels drawn from the model's own p(y | x), for the "true" Fisher information [ours].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

SampleLoss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
TaskName = Literal["classification", "regression", "causal_lm", "token_classification"]
IGNORED = -100  # a label that is not learnt, as in torch and transformers


def classification_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of each sample, (N,), by the logits (N, classes) and ``batch["labels"]``, integers (N,)."""
    labels = _labels(batch)
    logits = _logits(model, batch)
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"logits {tuple(logits.shape)}, labels {labels.dtype} {tuple(labels.shape)}: wanted (N, classes) and "
            "integers (N,); pass sample_loss for another task"
        )
    if logits.shape[1] < 2:
        raise ValueError("logits (N, 1): one class has nothing to tell apart, wanted sample_loss='regression'")
    return _cross_entropy(logits, labels)


def regression_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """½‖f(x) − y‖² of each sample, (N,): −log p of a Gaussian of unit variance, less a constant.

    f(x) are the logits (N, k), ``batch["labels"]`` floats (N, k), or (N,) for k = 1.
    """
    labels = _labels(batch)
    logits = _logits(model, batch)
    if logits.dim() == 2 and labels.dim() == 1:
        labels = labels[:, None]
    if logits.dim() != 2 or labels.shape != logits.shape or not labels.is_floating_point():
        raise ValueError(
            f"logits {tuple(logits.shape)}, labels {labels.dtype} {tuple(labels.shape)}: wanted (N, k) and floats "
            "(N, k), or (N,) for k = 1"
        )
    return (wide(logits) - wide(labels)).square().sum(1) / 2


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """−log p of each sample's labelled tokens, (N,): Σ_t −log p(label_{t+1} | tokens up to t), logits (N, T, words).

    ``batch["labels"]``, integers (N, T), are the tokens themselves, −100 where one is not learnt (prompt, padding); a
    sample without a label has the loss 0. A sum, not a mean: the loss is that of the whole sequence.
    """
    logits, labels = _token_logits(model, batch)
    return _token_sums(logits[:, :-1], labels[:, 1:])


def token_classification_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy summed over each sample's labelled tokens, (N,), logits (N, T, classes); for masked words too.

    ``batch["labels"]``: integers (N, T), −100 where a token has no label.
    """
    return _token_sums(*_token_logits(model, batch))


class Task(NamedTuple):
    """loss: of each sample. draw: labels from p(y | x), as ``batch["labels"]`` are, by a CPU generator."""

    loss: SampleLoss
    draw: Callable[[nn.Module, Mapping[str, Tensor], Generator | None], Tensor]


def wide(values: Tensor) -> Tensor:
    """At least float32; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(f"batch: 'labels' is {type(labels).__name__}, wanted a tensor")
    return labels if labels.is_floating_point() else labels.long()


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's output, asked for without labels: it would compute a loss of its own for nothing."""
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def _token_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    labels = _labels(batch)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            "sample_loss: the labels of an encoder-decoder are its decoder's inputs, too; wanted a function"
        )
    logits = _logits(model, batch)
    if logits.dim() != 3 or labels.shape != logits.shape[:2] or labels.is_floating_point():
        raise ValueError(
            f"logits {tuple(logits.shape)}, labels {labels.dtype} {tuple(labels.shape)}: wanted (N, T, classes) and "
            "integers (N, T)"
        )
    return logits, labels


def _token_sums(logits: Tensor, labels: Tensor) -> Tensor:
    return _cross_entropy(logits.transpose(1, 2), labels).sum(1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    try:
        return F.cross_entropy(wide(logits), labels, reduction="none", ignore_index=IGNORED)
    except IndexError:  # on the CPU; CUDA's own assertion ends the process
        classes = logits.shape[1]
        bad = (((labels < 0) & (labels != IGNORED)) | (labels >= classes)).nonzero()[0].tolist()
        raise ValueError(
            f"labels: {int(labels[tuple(bad)])} in sample {bad[0]}, wanted 0 … {classes - 1}, or {IGNORED} for none"
        ) from None


def _sampled(logits: Tensor, generator: Generator | None) -> Tensor:
    """One class for each row of logits (…, classes)."""
    share = logits.float().softmax(-1).cpu().flatten(0, -2)
    return torch.multinomial(share, 1, generator=generator).view(logits.shape[:-1]).to(logits.device)


@torch.no_grad()
def draw_classes(model: nn.Module, batch: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
    """Labels (N,) from p(y | x) of a classifier; where the data's label is −100, it stays."""
    drawn = _sampled(_logits(model, batch), generator)
    known = batch.get("labels")
    return drawn if known is None else torch.where(known == IGNORED, IGNORED, drawn)


@torch.no_grad()
def draw_values(model: nn.Module, batch: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
    """f(x) plus noise of unit variance, (N, k)."""
    logits = _logits(model, batch).float()
    return logits + torch.randn(logits.shape, generator=generator).to(logits.device)


@torch.no_grad()
def draw_next_tokens(model: nn.Module, batch: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
    """At every labelled place a token from p(· | the tokens before it in the data); −100 stays."""
    logits, labels = _token_logits(model, batch)
    drawn = torch.cat([labels[:, :1], _sampled(logits[:, :-1], generator)], dim=1)
    return torch.where(labels == IGNORED, IGNORED, drawn)


@torch.no_grad()
def draw_token_classes(model: nn.Module, batch: Mapping[str, Tensor], generator: Generator | None = None) -> Tensor:
    """At every labelled place a class from p; −100 stays."""
    logits, labels = _token_logits(model, batch)
    return torch.where(labels == IGNORED, IGNORED, _sampled(logits, generator))


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "classification": Task(classification_loss, draw_classes),
        "regression": Task(regression_loss, draw_values),
        "causal_lm": Task(causal_lm_loss, draw_next_tokens),
        "token_classification": Task(token_classification_loss, draw_token_classes),
    }
)


def task_of(sample_loss: str | SampleLoss) -> Task | SampleLoss:
    """The task of that name, or the function that was given. Raises ValueError or TypeError for anything else."""
    if isinstance(sample_loss, str):
        if sample_loss not in TASKS:
            raise ValueError(f"sample_loss: {sample_loss!r}, wanted one of {', '.join(TASKS)}, or a function")
        return TASKS[sample_loss]
    if not callable(sample_loss):
        raise TypeError(f"sample_loss: {type(sample_loss).__name__}, wanted a task's name or a function")
    return sample_loss


def own_losses(loss: SampleLoss, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The samples' own losses (N,). Raises ValueError for a function that gives something else."""
    losses = loss(model, batch)
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        given = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"sample_loss: gave {given}, wanted a tensor (N,)")
    if not losses.requires_grad:
        raise ValueError("sample_loss: gave losses without a gradient, wanted ones that the model was asked for")
    return losses
