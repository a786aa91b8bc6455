"""dp_step: the clipped sum, noise and division of DP-SGD, its accountant, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from torch import nn

from fibecfed import FlatAdapter, MaskedAdamW, UnsupportedModuleError, dp_step
from fibecfed.losses import classification_loss
from tests.fibecfed.test_capture import assert_close
from tests.fibecfed.test_clipping import clipped_sum, norm_of, own_gradients, squared_norms, trainable_norm, trained
from tests.fibecfed.tiny import batch, tiny


def sgd(model: nn.Module, lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD(trained(model).values(), lr=lr)


def step(model: nn.Module, batches: Any = None, **changes: Any) -> Any:
    options = {"max_norm": 1.0, "noise_multiplier": 0.0, "expected_batch_size": 8, **changes}
    return dp_step(model, batch() if batches is None else batches, options.pop("optimizer", sgd(model)), **options)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained(model).items()}


def test_without_noise_it_steps_by_the_clipped_sum_over_the_expected_batch_size() -> None:
    model, whole = tiny(), batch()
    gradients = own_gradients(model, whole)
    max_norm, before = norm_of("median", gradients), values(model)
    model(**whole).loss.backward()  # what .grad held before is dropped
    found = step(model, whole, max_norm=max_norm)
    for name, value in clipped_sum(gradients, max_norm).items():
        grad = trained(model)[name].grad
        assert grad is not None
        assert_close(grad, value / 8, 1e-4)
        assert torch.equal(trained(model)[name].detach(), before[name] - grad)
    assert_close(found.scores, squared_norms(gradients))
    assert_close(found.losses, classification_loss(tiny(), whole).detach().double())
    assert (found.factors < 1).sum() == 2
    assert not found.losses.requires_grad


def test_micro_batches_are_the_whole_batch_and_are_noised_once() -> None:
    whole = batch(samples=6)
    parts = [{name: value[span] for name, value in whole.items()} for span in (slice(0, 4), slice(4, 6))]
    results = []
    for batches in (whole, parts):
        model = tiny()
        found = step(model, batches, noise_multiplier=0.5, generator=torch.Generator().manual_seed(3))
        results.append((found, values(model)))
    (found_whole, whole_values), (found_parts, part_values) = results
    assert_close(found_parts.scores, found_whole.scores.double())
    for name, value in whole_values.items():
        assert_close(part_values[name], value.double(), 1e-5)


def test_the_noise_has_the_standard_deviation_it_is_said_to_have_and_comes_of_the_generator() -> None:
    model = tiny()
    before = values(model)
    found = step(model, [], max_norm=3.0, noise_multiplier=2.0, generator=torch.Generator().manual_seed(5))
    moved = torch.cat([(before[name] - p).flatten() for name, p in values(model).items()])
    assert [len(value) for value in found] == [0, 0, 0]
    expected = 2.0 * 3.0 / 8
    assert len(moved) > 1500
    assert abs(float(moved.std()) / expected - 1) < 5 / math.sqrt(2 * len(moved))
    assert abs(float(moved.mean())) < 5 * expected / math.sqrt(len(moved))
    again = tiny()
    step(again, [], max_norm=3.0, noise_multiplier=2.0, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(value, values(model)[name]) for name, value in values(again).items())
    other = tiny()
    step(other, [], max_norm=3.0, noise_multiplier=2.0, generator=torch.Generator().manual_seed(6))
    assert not any(torch.equal(value, values(model)[name]) for name, value in values(other).items())


@pytest.mark.parametrize("kind", [RDPAccountant, PRVAccountant])
def test_opacus_accountants_take_the_steps(kind: Any) -> None:
    model, mine, theirs = tiny(), kind(), kind()
    for _ in range(3):
        step(model, noise_multiplier=1.1, accountant=mine, sample_rate=0.05)
        theirs.step(noise_multiplier=1.1, sample_rate=0.05)
    step(model, [], noise_multiplier=1.1, accountant=mine, sample_rate=0.05)  # an empty draw is a step too
    theirs.step(noise_multiplier=1.1, sample_rate=0.05)
    assert mine.history == [(1.1, 0.05, 4)]
    assert mine.get_epsilon(delta=1e-5) == theirs.get_epsilon(delta=1e-5) < 5


def test_masked_adamw_on_a_flat_adapter_steps_as_torch_does() -> None:
    ours, theirs = tiny(), tiny()
    flat = FlatAdapter(ours)
    mine, torchs = MaskedAdamW(flat, lr=0.01), torch.optim.AdamW(trained(theirs).values(), lr=0.01)
    for seed in (1, 2):
        for model, optimizer in ((ours, mine), (theirs, torchs)):
            noise = torch.Generator().manual_seed(seed)
            step(model, batch(seed=seed), optimizer=optimizer, noise_multiplier=1.0, generator=noise)
    flat.check()
    for name, p in trained(theirs).items():
        assert_close(trained(ours)[name].detach(), p.detach().double(), 1e-5)


def test_a_custom_loss() -> None:
    first, second = tiny(), tiny()
    step(first)
    step(second, sample_loss=classification_loss)
    assert all(torch.equal(p, values(second)[name]) for name, p in values(first).items())


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
