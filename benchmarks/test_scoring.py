"""Scoring a data set, and a training step with and without the capture."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fibecfed import capture_fisher, score_samples
from fibecfed.batches import length_buckets
from fibecfed.losses import classification_loss

from .comparison import Comparison, Provider, Work, relative_error
from .machine import has_bf16
from .minilm import BATCH, SAMPLES, Batch, Job, job

TOLERANCE = 1e-3  # bf16 autocast is not held to it: its rank correlation stands in the provider's name


def loop(of: Job) -> Tensor:
    """One sample, one backward pass."""
    scores = []
    for n in range(SAMPLES):
        loss = classification_loss(of.model, of.batch(np.array([n]))).sum()
        scores.append(sum(g.square().sum() for g in torch.autograd.grad(loss, of.lora)))
    return torch.stack(scores)


def plain(of: Job, parts: list[Batch]) -> None:
    """Forward and backward alone, for the ordinary gradients of what is trained; nothing is scored."""
    for batch in parts:
        of.model.zero_grad()
        classification_loss(of.model, batch).sum().backward()


def scored(of: Job, arrival: bool = False, bf16: bool = False) -> Tensor:
    """score_samples in arrival order, or on batches of like length as the driver makes them."""
    buckets = length_buckets(of.data, BATCH)
    parts = of.arrival if arrival else [of.batch(bucket) for bucket in buckets.batches]
    with torch.autocast(of.device.type, torch.bfloat16, enabled=bf16):
        scores = score_samples(of.model, parts).scores
    return scores if arrival else scores[torch.from_numpy(buckets.inverse).to(scores.device)]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([t.cpu().argsort().argsort().double() for t in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.modes("all cold")
def test_score_samples(compare: Comparison, device: torch.device) -> None:
    of = job(device)
    truth = loop(Job(copy.deepcopy(of.model).double(), of.data, device))
    assert truth.dtype == torch.float64

    def error(found: Tensor) -> float:
        return relative_error([found], [truth])

    providers: dict[str, Provider] = {
        "fibecfed": Provider(lambda: scored(of), error),
        "fibecfed, arrival order": Provider(lambda: scored(of, arrival=True), error),
        "batch-of-1 loop": Provider(lambda: loop(of), error),
        "forward + backward alone, arrival order": Provider(lambda: plain(of, of.arrival)),
    }
    if has_bf16(device):
        rank = rank_correlation(scored(of, bf16=True), truth)
        name = f"fibecfed, bf16 autocast (rank correlation {rank:.4f})"
        providers[name] = Provider(lambda: scored(of, bf16=True))
    flop = of.flop(int(of.data.lengths[:SAMPLES].sum()))
    work = Work("scoring", f"MiniLM r=8, {SAMPLES} film reviews", torch.float32, of.bytes, flop)
    compare(work, providers, TOLERANCE)


@pytest.mark.modes("warm")
def test_training_step(compare: Comparison, device: torch.device) -> None:
    """Forward and backward of one batch; with the capture, scores and diagonal come out of the same backward."""
    of = job(device)
    batch = of.middle

    def step() -> None:
        of.model.zero_grad()
        classification_loss(of.model, batch).mean().backward()

    def captured() -> None:
        of.model.zero_grad()
        with capture_fisher(of.model, "mean"):
            classification_loss(of.model, batch).mean().backward()

    calls: dict[str, Callable[[], None]] = {"fibecfed": captured, "the same step without capture": step}
    flop = of.flop(int(batch["attention_mask"].sum()))
    work = Work("training step", f"MiniLM r=8, N={BATCH}", torch.float32, of.bytes, flop)
    compare(work, {name: Provider(call) for name, call in calls.items()}, 0.0)
