"""What dp_step refuses: by name, before anything moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from opacus.accountants import RDPAccountant
from torch import nn

from fibecfed import FisherCaptureError, FlatAdapter, MaskedAdamW, UnsupportedModuleError, dp_step
from fibecfed.losses import classification_loss
from tests.fibecfed.test_clipping import trained
from tests.fibecfed.test_clipping_guards import trainable_norm
from tests.fibecfed.test_privacy import sgd, step, values
from tests.fibecfed.tiny import batch, tiny


def foreign(model: nn.Module) -> torch.optim.Optimizer:
    return sgd(tiny())


def with_a_stranger(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([*trained(model).values(), nn.Parameter(torch.ones(()))], lr=1.0)


def with_what_was_frozen_later(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = sgd(model)
    model.base_model.model.classifier.requires_grad_(False)
    return optimizer


def flat_with_what_was_frozen_later(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = MaskedAdamW(FlatAdapter(model), lr=1.0)
    model.base_model.model.classifier.requires_grad_(False)
    return optimizer


@pytest.mark.parametrize(
    "make", [foreign, with_a_stranger, with_what_was_frozen_later, flat_with_what_was_frozen_later]
)
def test_an_optimizer_that_would_move_anything_else_is_refused(make: Any) -> None:
    model = tiny()
    optimizer = make(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="optimizer: moves a parameter"):
        step(model, optimizer=optimizer, noise_multiplier=1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_parameters_of_fewer_digits_are_refused() -> None:
    model = tiny()
    model.base_model.model.classifier.bfloat16()
    with pytest.raises(TypeError, match=r"classifier.*torch\.bfloat16, wanted float32"):
        step(model)


def test_inference_mode_is_refused_also_for_an_empty_draw() -> None:
    with torch.inference_mode(), pytest.raises(FisherCaptureError, match="inference mode"):
        step(tiny(), [])


@pytest.mark.parametrize(
    ("model", "optimizer", "wanted"),
    [
        (3, None, "model: int"),
        (None, None, "model: None"),
        (tiny(), None, "optimizer: NoneType"),
        (tiny(), torch.optim.SGD, "optimizer: type"),
        (tiny(), torch.optim.LBFGS(tiny().parameters()), "optimizer: LBFGS"),
    ],
)
def test_what_is_no_model_or_optimizer_is_refused(model: Any, optimizer: Any, wanted: str) -> None:
    with pytest.raises(TypeError, match=wanted):
        dp_step(model, batch(), optimizer, max_norm=1.0, noise_multiplier=1.0, expected_batch_size=8)


@pytest.mark.parametrize(
    ("changes", "error", "wanted"),
    [
        ({"max_norm": 0}, ValueError, "max_norm: 0"),
        ({"max_norm": "1"}, TypeError, "max_norm: str"),
        ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier: -1.0"),
        ({"noise_multiplier": float("nan")}, ValueError, "noise_multiplier: nan"),
        ({"expected_batch_size": 0}, ValueError, "expected_batch_size: 0"),
        ({"noise_multiplier": True}, TypeError, "noise_multiplier: bool"),
        ({"accountant": RDPAccountant()}, ValueError, "accountant, sample_rate"),
        ({"sample_rate": 0.1}, ValueError, "accountant, sample_rate"),
        ({"accountant": RDPAccountant(), "sample_rate": 0.1}, ValueError, "noise_multiplier: 0"),
        ({"accountant": RDPAccountant(), "sample_rate": 0.0, "noise_multiplier": 1}, ValueError, "sample_rate: 0.0"),
        ({"accountant": RDPAccountant(), "sample_rate": 1.5, "noise_multiplier": 1}, ValueError, "sample_rate: 1.5"),
        ({"sample_loss": "clasification"}, ValueError, "sample_loss: 'clasification'"),
        ({"sample_loss": lambda m, b: m(**b).loss}, ValueError, r"sample_loss: gave shape \(\)"),
        ({"sample_loss": lambda m, b: classification_loss(m, b)[1:]}, ValueError, "sample_loss: 4 losses for 5"),
        (
            {"sample_loss": lambda m, b: classification_loss(m, b).detach()},
            ValueError,
            "sample_loss: gave losses without",
        ),
        ({"accountant": RDPAccountant, "sample_rate": 0.1, "noise_multiplier": 1}, TypeError, "accountant: <class"),
        ({"accountant": "rdp", "sample_rate": 0.1, "noise_multiplier": 1}, TypeError, "accountant: 'rdp'"),
        ({"generator": 42}, TypeError, "generator: int"),
        ({"expected_batch_size": 10**400}, ValueError, "expected_batch_size: 1000"),
        ({"batches": 3}, TypeError, "batches: int"),
        ({"batches": [3]}, TypeError, "batches: list"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_moves(changes: dict[str, Any], error: type, wanted: str) -> None:
    model = tiny()
    before = values(model)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.1)
    with pytest.raises(error, match=wanted):
        step(model, optimizer=optimizer, **changes)
    assert all(torch.equal(p, before[name]) for name, p in values(model).items())
    assert not optimizer.state
    assert all(p.grad is None or not p.grad.any() for p in trained(model).values())


def test_a_gradient_that_is_not_finite_stops_the_step_before_it_is_counted() -> None:
    model, whole, accountant = tiny(), batch(), RDPAccountant()
    before = values(model)
    good = copy.deepcopy(whole)

    def bad(model: nn.Module, given: Any) -> torch.Tensor:
        factor = float("nan") if given is whole else 1.0
        return factor * classification_loss(model, given)

    with pytest.raises(ValueError, match="not finite"):
        step(model, [good, whole], sample_loss=bad, accountant=accountant, sample_rate=0.1, noise_multiplier=1.0)
    assert all(torch.equal(p, before[name]) for name, p in values(model).items())
    assert not any(p.grad.any() for p in trained(model).values() if p.grad is not None)
    assert len(accountant) == 0


@pytest.mark.parametrize("batches", [[], None], ids=["empty", "batch"])
def test_what_cannot_be_clipped_is_refused_also_for_an_empty_draw(batches: Any) -> None:
    with pytest.raises(UnsupportedModuleError, match="LayerNorm"):
        step(trainable_norm(), batches, noise_multiplier=1.0)
