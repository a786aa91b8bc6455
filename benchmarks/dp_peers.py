"""Opacus' two ways to the clipped sum of a batch.

It puts hooks into the model that it is given, and records in training mode alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Sums = list[Tensor]  # in the order of what is trained


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _inputs(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "labels"}


def opacus_hooks(model: nn.Module, batch: Batch, max_norm: float) -> Callable[[], Sums]:
    """Per-sample gradients of what is trained, held in memory."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

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


def opacus_ghost(model: nn.Module, batch: Batch, max_norm: float) -> Callable[[], Sums]:
    """Norms by Gram matrices, then a second backward pass of the weighted losses."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

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
