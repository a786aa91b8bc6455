"""dp_step: the clipped sum, noise and division of DP-SGD, its accountant, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from torch import nn

from fibecfed import FlatAdapter, MaskedAdamW, dp_step
from fibecfed.losses import classification_loss
from tests.fibecfed.test_capture import assert_close
from tests.fibecfed.test_clipping import clipped_sum, norm_of, own_gradients, squared_norms, trained
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


def noise_of(model: nn.Module, seed: int, **changes: Any) -> dict[str, torch.Tensor]:
    """What an empty draw moves by: noise alone, in units of its standard deviation."""
    before = values(model)
    step(model, [], noise_multiplier=2.0, generator=torch.Generator().manual_seed(seed), **changes)
    return {name: (before[name] - p) / (2.0 / 8) for name, p in values(model).items()}


def test_the_noise_is_normal_and_another_one_for_every_parameter_and_step() -> None:
    drawn = [noise_of(tiny(), seed) for seed in range(40)]
    whole = torch.cat([value.flatten() for one in drawn for value in one.values()]).double()
    assert len(whole) > 60_000
    assert abs(float(whole.std()) - 1) < 0.015  # five times the spread of the estimate
    assert abs(float(whole.pow(4).mean()) - 3) < 0.2  # 1.8 if it were uniform
    for one in drawn[:2]:
        same = [value.flatten() for value in one.values() if value.numel() == drawn[0][next(iter(one))].numel()]
        assert len(same) > 2
        for i, value in enumerate(same):
            assert all(abs(float(torch.corrcoef(torch.stack([value, other]))[0, 1])) < 0.5 for other in same[:i])


def test_frozen_parameters_get_no_noise() -> None:
    model = tiny()
    step(model, noise_multiplier=1.0)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


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


class Refusing:
    """An accountant that does not allow the step."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        raise self.error("budget spent")


def test_a_step_that_is_not_counted_is_not_made() -> None:
    model = tiny()
    before = values(model)
    with pytest.raises(RuntimeError, match="budget spent"):
        step(model, accountant=Refusing(RuntimeError), sample_rate=0.1, noise_multiplier=1.0)
    assert all(torch.equal(p, before[name]) for name, p in values(model).items())
    assert not any(p.grad.any() for p in trained(model).values() if p.grad is not None)


def test_a_batch_without_samples_is_an_empty_draw() -> None:
    none = {name: value[:0] for name, value in batch().items()}
    results = []
    for batches in (none, [], [none, none]):
        model = tiny()
        found = step(model, batches, noise_multiplier=1.0, generator=torch.Generator().manual_seed(1))
        assert found.losses.shape == (0,)
        results.append(values(model))
    assert all(torch.equal(value, other[name]) for other in results[1:] for name, value in results[0].items())
    mixed, plain = tiny(), tiny()
    step(mixed, [none, batch()])
    step(plain)
    assert all(torch.equal(value, values(plain)[name]) for name, value in values(mixed).items())


def test_every_sample_drawn_each_time_is_a_sample_rate_of_one() -> None:
    accountant = RDPAccountant()
    step(tiny(), accountant=accountant, sample_rate=1, noise_multiplier=1)
    assert accountant.history == [(1.0, 1.0, 1)]


def test_it_steps_under_no_grad_and_its_losses_are_float32() -> None:
    first, second = tiny(), tiny()
    step(first)
    with torch.no_grad():
        found = step(second, sample_loss=lambda m, b: classification_loss(m, b).double())
    assert found.losses.dtype == torch.float32
    for name, value in values(first).items():
        assert_close(values(second)[name], value.double(), 1e-6)


def test_a_custom_loss() -> None:
    first, second = tiny(), tiny()
    step(first)
    step(second, sample_loss=classification_loss)
    assert all(torch.equal(p, values(second)[name]) for name, p in values(first).items())
