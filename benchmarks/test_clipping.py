"""The clipped sum of a batch, as DP-SGD wants it: forward, backward and clipping, by everyone who does it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn

from fibecfed import clip_sample_gradients
from fibecfed.losses import classification_loss

from .comparison import Comparison, Provider, Work, relative_error
from .minilm import BATCH, Batch, Job, job

TOLERANCE = 1e-4
Sums = list[Tensor]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


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


def _inputs(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "labels"}


def opacus_hooks(of: Job, batch: Batch, max_norm: float) -> Callable[[], Sums]:
    """Per-sample gradients of what is trained, held in memory."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = without_dropout(of.model)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(trained(model), lr=0.0),
        noise_multiplier=0.0, max_grad_norm=max_norm, expected_batch_size=1, loss_reduction="sum",
    )  # fmt: skip

    def call() -> Sums:
        optimizer.zero_grad()
        logits = wrapped(**_inputs(batch)).logits
        nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").backward()
        optimizer.pre_step()
        return [p.grad for p in trained(model)]

    return call


def opacus_ghost(of: Job, batch: Batch, max_norm: float) -> Callable[[], Sums]:
    """Norms by Gram matrices, then a second backward pass of the weighted losses."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    model = without_dropout(of.model)
    wrapped = GradSampleModuleFastGradientClipping(
        model, loss_reduction="sum", max_grad_norm=max_norm, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(trained(model), lr=0.0),
        noise_multiplier=0.0, max_grad_norm=max_norm, expected_batch_size=1, loss_reduction="sum",
    )  # fmt: skip
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss(reduction="sum"), "sum")

    def call() -> Sums:
        optimizer.zero_grad()
        logits = wrapped(**_inputs(batch)).logits
        criterion(logits, batch["labels"]).backward()
        return [p.grad for p in trained(model)]

    return call


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
        calls["Opacus, hooks"] = opacus_hooks(of, batch, max_norm)
        calls["Opacus, fast gradient clipping"] = opacus_ghost(of, batch, max_norm)
    providers = {name: Provider(call, error) for name, call in calls.items()}
    providers["the same step without clipping"] = Provider(plain(of, batch))
    flop = of.flop(int(batch["attention_mask"].sum()))
    work = Work("clipped sum", f"MiniLM r=8, N={BATCH}", torch.float32, of.bytes, flop)
    compare(work, providers, TOLERANCE, modes=("warm",))
