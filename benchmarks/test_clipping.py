"""The clipped sum of a batch, as DP-SGD wants it: forward, backward and clipping, by everyone who does it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from fibecfed import clip_sample_gradients
from fibecfed.losses import classification_loss

from .comparison import Comparison, Provider, Work, relative_error
from .dp_peers import Sums, opacus_ghost, opacus_hooks, trained
from .minilm import BATCH, Batch, Job, job

TOLERANCE = 1e-4


def without_dropout(model: nn.Module) -> nn.Module:
    """A copy in training mode, in which alone Opacus records."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def ours(of: Job, batch: Batch, max_norm: float) -> Callable[[], Sums]:
    model = without_dropout(of.model)

    def call() -> Sums:
        model.zero_grad()
        with clip_sample_gradients(model, max_norm, "sum"):
            classification_loss(model, batch).sum().backward()
        return [p.grad for p in trained(model)]

    return call


def loop(of: Job, batch: Batch, max_norm: float, model: nn.Module | None = None) -> Callable[[], Sums]:
    model = without_dropout(of.model) if model is None else model

    def call() -> Sums:
        sums = [torch.zeros_like(p) for p in trained(model)]
        for n in range(BATCH):
            real = batch["attention_mask"][n].bool()
            alone = {k: v[n : n + 1, real] if v.dim() > 1 else v[n : n + 1] for k, v in batch.items()}
            own = torch.autograd.grad(classification_loss(model, alone).sum(), trained(model))
            factor = (max_norm / torch.stack([g.square().sum() for g in own]).sum().sqrt()).clamp(max=1)
            for total, g in zip(sums, own, strict=True):
                total.add_(factor * g)
        return sums

    return call


def plain(of: Job, batch: Batch) -> Callable[[], Sums]:
    model = without_dropout(of.model)

    def call() -> Sums:
        model.zero_grad()
        classification_loss(model, batch).sum().backward()
        return [p.grad for p in trained(model)]

    return call


@pytest.mark.modes("warm")
def test_clipped_sum(compare: Comparison, device: torch.device) -> None:
    of = job(device)
    batch = of.middle
    with clip_sample_gradients(of.model, 1.0, "sum") as clipped:
        classification_loss(of.model, batch).sum().backward()
    of.model.zero_grad()
    max_norm = float(np.median(clipped.scores.sqrt().cpu()))  # half of the samples are clipped
    truth = [t.double() for t in loop(of, batch, max_norm, without_dropout(of.model).double())()]

    def error(found: Sums) -> float:
        return relative_error(found, truth)

    calls = {"fibecfed": ours(of, batch, max_norm), "batch-of-1 loop": loop(of, batch, max_norm)}
    if find_spec("opacus") is not None:
        calls["Opacus, hooks"] = opacus_hooks(without_dropout(of.model), batch, max_norm)
        calls["Opacus, fast gradient clipping"] = opacus_ghost(without_dropout(of.model), batch, max_norm)
    providers = {name: Provider(call, error) for name, call in calls.items()}
    providers["the same step without clipping"] = Provider(plain(of, batch))
    flop = of.flop(int(batch["attention_mask"].sum()))
    work = Work("clipped sum", f"MiniLM r=8, N={BATCH}", torch.float32, of.bytes, flop)
    compare(work, providers, TOLERANCE)
