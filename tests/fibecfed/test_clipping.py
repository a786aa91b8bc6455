"""clip_sample_gradients against a float64 loop that clips sample by sample, and against Opacus."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.dp_peers import opacus_ghost, opacus_hooks
from fibecfed import FlatAdapter, clip_sample_gradients
from tests.fibecfed.test_capture import assert_close
from tests.fibecfed.tiny import KINDS, batch, fill_b, sample, tiny

NORMS = (1e-3, "median", 1e3)  # all samples are clipped, some, none


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def own_gradients(model: nn.Module, whole: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every sample's gradient by all that is trained, float64, one sample at a time."""
    double = copy.deepcopy(model).double()
    parameters = trained(double)
    gradients = []
    for n in range(len(whole["labels"])):
        found = torch.autograd.grad(double(**sample(whole, n)).loss, list(parameters.values()))
        gradients.append(dict(zip(parameters, found, strict=True)))
    return gradients


def squared_norms(gradients: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([sum(g.square().sum() for g in own.values()) for own in gradients])


def clipped_sum(gradients: list[dict[str, Tensor]], max_norm: float) -> dict[str, Tensor]:
    factors = (max_norm / squared_norms(gradients).sqrt()).clamp(max=1)
    return {name: sum(f * own[name] for f, own in zip(factors, gradients, strict=True)) for name in gradients[0]}


def norm_of(which: float | str, gradients: list[dict[str, Tensor]]) -> float:
    return float(squared_norms(gradients).sqrt().median()) if which == "median" else float(which)


def frozen_head(model: nn.Module) -> nn.Module:
    for name, p in trained(model).items():
        p.requires_grad_("lora_" in name)
    return model


def frozen_head_weight(model: nn.Module) -> nn.Module:
    for name, p in trained(model).items():
        p.requires_grad_("lora_" in name or name.endswith("bias"))
    return model


@pytest.mark.parametrize("which", NORMS)
@pytest.mark.parametrize("change", [lambda model: model, frozen_head, frozen_head_weight], ids=["all", "lora", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_clipped_sum_is_that_of_the_batch_of_one_loop(
    kind: str, change: Callable[[nn.Module], nn.Module], which: float | str
) -> None:
    model, whole = change(tiny(kind)), batch()
    gradients = own_gradients(model, whole)
    max_norm = norm_of(which, gradients)
    with clip_sample_gradients(model, max_norm) as clipped:
        model(**whole).loss.backward()
    norms = squared_norms(gradients)
    assert_close(clipped.scores, norms)
    assert_close(clipped.factors, (max_norm / norms.sqrt()).clamp(max=1), 1e-5)
    truth = clipped_sum(gradients, max_norm)
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in truth)
        if p.grad is not None:
            assert_close(p.grad, truth[name], 1e-5)


@pytest.mark.parametrize("which", NORMS)
@pytest.mark.parametrize("peer", [opacus_hooks, opacus_ghost])
@pytest.mark.parametrize("kind", KINDS)
def test_the_clipped_sum_is_that_of_opacus(kind: str, peer: Any, which: float | str) -> None:
    model, whole = tiny(kind), batch()
    max_norm = norm_of(which, own_gradients(model, whole))
    theirs = peer(copy.deepcopy(model).train(), whole, max_norm)()
    with clip_sample_gradients(model, max_norm):
        model(**whole).loss.backward()
    for p, wanted in zip(trained(model).values(), theirs, strict=True):
        assert p.grad is not None
        assert_close(p.grad, wanted.double(), 1e-5)


def test_a_sum_a_scaled_loss_and_accumulation_give_the_same_clipped_sum() -> None:
    model, whole = tiny(), batch()
    with clip_sample_gradients(model, 0.5) as mean:
        model(**whole).loss.backward()
    first = {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}
    with clip_sample_gradients(model, 0.5, "sum", loss_scale=1024.0) as total:
        logits = model(**{k: v for k, v in whole.items() if k != "labels"}).logits
        (1024 * nn.functional.cross_entropy(logits, whole["labels"], reduction="sum")).backward()
    assert_close(total.scores, mean.scores.double())
    for name, p in trained(model).items():
        assert p.grad is not None
        assert_close(p.grad, 2 * first[name].double(), 1e-5)  # added to what the first block left


def test_gradients_stay_views_of_a_flat_adapter() -> None:
    model, whole = tiny(), batch()
    truth = clipped_sum(own_gradients(model, whole), 0.5)
    flat = FlatAdapter(model)
    with clip_sample_gradients(model, 0.5):
        model(**whole).loss.backward()
    flat.check()
    for entry, p in flat.named_views():
        assert p.grad is not None
        assert_close(p.grad, truth[entry.name], 1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_dropout(reentrant: bool) -> None:
    """Clipped at a norm that no sample reaches, the sum is the ordinary gradient of the pass that was run."""
    model, whole = tiny(dropout=0.2, lora_dropout=0.2).train(), batch()
    torch.manual_seed(7)
    model(**whole).loss.backward()
    plain = {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(7)
    with clip_sample_gradients(model, 1e4):
        model(**whole).loss.backward()
    for name, p in trained(model).items():
        assert p.grad is not None
        assert_close(p.grad, plain[name].double() * len(whole["labels"]), 1e-4)


def test_autocast_clips_what_autocast_computes() -> None:
    model, whole = tiny(), batch()
    gradients = own_gradients(model, whole)
    truth = clipped_sum(gradients, norm_of("median", gradients))
    with clip_sample_gradients(model, norm_of("median", gradients)), torch.autocast("cpu", torch.bfloat16):
        model(**whole).loss.backward()
    for name, p in trained(model).items():
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert_close(p.grad, truth[name], 0.1)


class Packed(nn.Module):
    """A classifier over packed tokens (1, total, d): LoRA and a head on tokens, then a head on sums of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, segments: Tensor) -> Tensor:
        y = torch.tanh(self.second(torch.tanh(self.first(x)))).squeeze(0)
        pooled = torch.zeros(int(segments.max()) + 1, 5).index_add(0, segments, y)
        return self.third(pooled).square().sum(1)


def test_packed_batches_with_heads_on_tokens_and_on_samples() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Packed(), LoraConfig(r=2, target_modules=["first"], modules_to_save=["second", "third"]))
    fill_b(model)
    x, lengths = torch.randn(1, 10, 6), [3, 5, 2]
    segments = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    gradients = []
    for n in range(3):
        own = model(x[:, segments == n], torch.zeros(lengths[n], dtype=torch.long)).sum()
        found = torch.autograd.grad(own, list(trained(model).values()))
        gradients.append(dict(zip(trained(model), (g.double() for g in found), strict=True)))
    max_norm = norm_of("median", gradients)
    cu_seqlens = torch.tensor([0, 3, 8, 10], dtype=torch.int32)
    with clip_sample_gradients(model, max_norm, "sum", cu_seqlens=cu_seqlens) as clipped:
        model(x, segments).sum().backward()
    assert_close(clipped.scores, squared_norms(gradients))
    assert len(gradients[0]) == 6
    for name, value in clipped_sum(gradients, max_norm).items():
        grad = trained(model)[name].grad
        assert grad is not None
        assert_close(grad, value, 1e-5)
