"""Adapters of which A or B, or whole modules, are frozen (FFA-LoRA trains B alone): what is trained is scored, clipped
and stepped, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fibecfed import (
    FlatAdapter,
    MaskedAdamW,
    UnsupportedModuleError,
    capture_fisher,
    check_sample_axis,
    clip_sample_gradients,
    dp_step,
    score_samples,
)
from tests.fibecfed.test_capture import assert_close, loop_truth, lora_parameters
from tests.fibecfed.tiny import batch, tiny

Frozen = Callable[[str], bool]
WAYS: dict[str, Frozen] = {
    "A": lambda name: "lora_A" in name,
    "B": lambda name: "lora_B" in name,
    "A, and a block": lambda name: "lora_A" in name or ".0." in name,
    "one A of many": lambda name: "layer.1.attention.self.query.lora_A" in name,
}
ways = pytest.mark.parametrize("frozen", WAYS.values(), ids=WAYS)


def half(frozen: Frozen) -> nn.Module:
    model = tiny()
    for name, p in lora_parameters(model).items():
        p.requires_grad_(not frozen(name))
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@ways
@pytest.mark.parametrize("weight_grad", [True, False])
def test_scores_and_diagonal_are_those_of_what_is_trained(frozen: Frozen, weight_grad: bool) -> None:
    model, whole = half(frozen), batch()
    scores, diagonal = loop_truth(model, whole)
    model(**whole).loss.backward()
    ordinary = {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}
    model.zero_grad()
    with capture_fisher(model, allow_frozen=True, weight_grad=weight_grad) as fisher:
        model(**whole).loss.backward()
    assert_close(fisher.scores, scores)
    assert fisher.diagonal.keys() == diagonal.keys() == {name for name in trained(model) if "lora_" in name}
    for name, value in diagonal.items():
        assert_close(fisher.diagonal[name], value)
    assert_close(torch.stack(list(fisher.module_scores.values())).sum(0), scores)
    for name, p in model.named_parameters():
        if p.requires_grad and (weight_grad or "lora_" not in name):
            assert p.grad is not None
            assert_close(p.grad, ordinary[name].double(), 1e-5)
        else:
            assert p.grad is None


@ways
def test_samples_are_scored_where_it_is_allowed(frozen: Frozen) -> None:
    model, whole = half(frozen), batch()
    found = score_samples(model, [whole], allow_frozen=True)
    assert_close(found.scores, loop_truth(model, whole)[0])
    check_sample_axis(model, whole)
    with pytest.raises(UnsupportedModuleError, match=r"is frozen.*allow_frozen=True leaves it out"):
        score_samples(model, [whole])


@ways
def test_the_clipped_sum_is_that_of_what_is_trained(frozen: Frozen) -> None:
    model, whole, own = half(frozen), batch(), []
    for n in range(len(whole["labels"])):
        loss = model(**{name: values[n : n + 1] for name, values in whole.items()}).loss
        own.append([g.double() for g in torch.autograd.grad(loss, list(trained(model).values()))])
    norms = torch.tensor([sum(float(g.square().sum()) for g in of) for of in own]).sqrt()
    bound = float(norms.median())
    with clip_sample_gradients(model, bound) as clipped:
        model(**whole).loss.backward()
    torch.testing.assert_close(clipped.scores.sqrt(), norms.float(), rtol=1e-4, atol=0)
    for i, p in enumerate(trained(model).values()):
        assert p.grad is not None
        wanted = torch.stack([min(1.0, bound / float(norm)) * of[i] for norm, of in zip(norms, own, strict=True)])
        torch.testing.assert_close(p.grad.double(), wanted.sum(0), rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_private_step_of_ffa_lora_moves_b_and_the_head_alone() -> None:
    model = half(WAYS["A"])
    flat = FlatAdapter(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    dp_step(model, batch(), MaskedAdamW(flat), max_norm=1.0, noise_multiplier=1.0, expected_batch_size=5)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {entry.name for entry in flat.entries} == set(trained(model))
    assert any("lora_B" in name for name in moved)
    assert not any("lora_A" in name for name in moved)


def test_a_model_whose_lora_is_all_frozen_is_refused() -> None:
    model = half(lambda name: True)
    with pytest.raises(ValueError, match="every LoRA weight is frozen"):
        score_samples(model, [batch()], allow_frozen=True)
