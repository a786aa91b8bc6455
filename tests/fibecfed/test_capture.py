"""capture_fisher against a float64 batch-of-1 loop of plain autograd, and in every setting it claims to be right in."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fibecfed import FisherCaptureError, capture_fisher
from fibecfed_kernels import lora_fisher_diag
from tests.fibecfed.tiny import KINDS, LAYERS, batch, fill_b, sample, tiny


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def loop_truth(model: nn.Module, whole: dict[str, Tensor], padded: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """scores and diagonal by float64, one sample at a time (without its padding), plain torch.autograd."""
    double = copy.deepcopy(model).double()
    parameters = {name: p for name, p in lora_parameters(double).items() if p.requires_grad}
    scores, diagonal = [], {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for n in range(len(whole["labels"])):
        gradients = torch.autograd.grad(double(**sample(whole, n, padded)).loss, list(parameters.values()))
        scores.append(sum(g.square().sum() for g in gradients))
        for name, g in zip(parameters, gradients, strict=True):
            diagonal[name] += g.square()
    return torch.stack(scores), diagonal


def graph_truth(model: nn.Module, whole: dict[str, Tensor], autocast: bool = False) -> Tensor:
    """Scores from ONE plain forward (so that dropout and autocast are the same), one backward a sample."""
    parameters = list(lora_parameters(model).values())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(**{k: v for k, v in whole.items() if k != "labels"}).logits
    losses = nn.functional.cross_entropy(logits.float(), whole["labels"], reduction="none")
    scores = []
    for n in range(len(losses)):
        gradients = torch.autograd.grad(losses[n], parameters, retain_graph=True)
        scores.append(sum(g.double().square().sum() for g in gradients))
    return torch.stack(scores)


def assert_close(actual: Tensor, truth: Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == truth.shape
    assert (actual.double() - truth).abs().max() <= tolerance * truth.abs().max()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_diagonal_and_gradients_are_the_batch_of_one_loop(kind: str, side: str) -> None:
    model, whole = tiny(kind), batch(side=side)
    # BERT counts positions from the left edge and pools the first one, so there left padding is part of the computation
    scores, diagonal = loop_truth(model, whole, padded=(kind, side) == ("bert", "left"))
    model(**whole).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with capture_fisher(model) as fisher:
        loss = model(**whole).loss
        loss.backward()
    assert_close(fisher.scores, scores)
    assert fisher.diagonal.keys() == diagonal.keys()
    for name in diagonal:
        assert_close(fisher.diagonal[name], diagonal[name])
    assert plain.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert_close(p.grad, plain[name].double(), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sum_reduction_and_loss_scale_give_the_same_scores_as_mean(kind: str) -> None:
    model, whole = tiny(kind), batch()
    with capture_fisher(model, "mean") as mean:
        model(**whole).loss.backward()
    with capture_fisher(model, "sum") as total:
        (model(**whole).loss * 5).backward()
    with capture_fisher(model, "mean", loss_scale=1024.0) as scaled:
        (model(**whole).loss * 1024.0).backward()
    assert_close(total.scores, mean.scores.double())
    assert_close(scaled.scores, mean.scores.double())
    name = next(iter(mean.diagonal))
    assert_close(scaled.diagonal[name], mean.diagonal[name].double())


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "r": 9},
        {"target_modules": "all-linear"},
        {"init_lora_weights": "gaussian"},
        {"target_modules": ["query", "key", "value", "dense"], "r": 1},
    ],
    ids=["rslora", "all-linear", "gaussian", "rank-1"],
)
def test_lora_options_that_are_supported(lora: dict[str, Any]) -> None:
    model, whole = tiny("bert", **lora), batch()
    scores, _ = loop_truth(model, whole)
    with capture_fisher(model) as fisher:
        model(**whole).loss.backward()
    assert_close(fisher.scores, scores)


def test_dropout_of_base_and_lora_scores_the_pass_that_was_run() -> None:
    model, whole = tiny("bert", dropout=0.3, lora_dropout=0.3).train(), batch()
    torch.manual_seed(7)
    truth = graph_truth(model, whole)
    torch.manual_seed(7)
    with capture_fisher(model) as fisher:
        model(**whole).loss.backward()
    assert_close(fisher.scores, truth)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_counts_every_module_once(kind: str, reentrant: bool) -> None:
    model, whole = tiny(kind), batch()
    scores, _ = loop_truth(model, whole)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    with capture_fisher(model) as fisher:
        model(**whole).loss.backward()
    assert_close(fisher.scores, scores)


@pytest.mark.parametrize("inside", [False, True], ids=["backward-outside", "backward-inside"])
def test_autocast_scores_what_autocast_computes(inside: bool) -> None:
    model, whole = tiny("bert"), batch()
    truth = graph_truth(model, whole, autocast=True)
    exact, _ = loop_truth(model, whole)
    with capture_fisher(model) as fisher:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**whole).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    assert_close(fisher.scores, truth, 0.03)
    assert_close(fisher.scores, exact, 0.15)


def test_a_bf16_model_with_float32_lora() -> None:
    model, whole = tiny("llama"), batch()
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    model.base_model.model.score.modules_to_save["default"].bfloat16()
    truth = graph_truth(model, whole)
    with capture_fisher(model) as fisher:
        model(**whole).loss.backward()
    assert_close(fisher.scores, truth, 0.03)


class Packed(nn.Module):
    """A model over packed tokens (1, total, d): each token alone, then a sum a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, segments: Tensor) -> Tensor:
        y = self.second(torch.tanh(self.first(x))).squeeze(0)
        return torch.zeros(int(segments.max()) + 1, 1).index_add(0, segments, y).square().sum(1)


def test_packed_batches_by_cu_seqlens() -> None:
    model = get_peft_model(Packed(), LoraConfig(r=2, target_modules=["first", "second"]))
    fill_b(model)
    x, lengths = torch.randn(1, 10, 6), [3, 5, 2]
    segments = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    cu_seqlens = torch.tensor([0, 3, 8, 10], dtype=torch.int32)
    with capture_fisher(model, "sum", cu_seqlens=cu_seqlens) as fisher:
        model(x, segments).sum().backward()
    truth = []
    for n in range(3):
        own = model(x[:, segments == n], torch.zeros(lengths[n], dtype=torch.long)).sum()
        truth.append(
            sum(g.double().square().sum() for g in torch.autograd.grad(own, list(lora_parameters(model).values())))
        )
    assert_close(fisher.scores, torch.stack(truth))


class Grid(nn.Module):
    """A linear over samples of several axes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)).flatten(1).sum(1).square()


@pytest.mark.parametrize("axes", [(), (3,), (2, 3), (2, 1, 3)])
def test_samples_of_any_number_of_axes(axes: tuple[int, ...]) -> None:
    model = get_peft_model(Grid(), LoraConfig(r=2, target_modules=["first"]))
    fill_b(model)
    x = torch.randn(4, *axes, 6)
    with capture_fisher(model, "sum") as fisher:
        model(x).sum().backward()
    parameters = list(lora_parameters(model).values())
    own = [torch.autograd.grad(model(x[n : n + 1]).sum(), parameters) for n in range(4)]
    assert_close(fisher.scores, torch.stack([sum(g.double().square().sum() for g in grads) for grads in own]))


def test_without_weight_grad_lora_gradients_stay_untouched() -> None:
    model, whole = tiny("bert"), batch()
    with capture_fisher(model, weight_grad=False) as fisher:
        model(**whole).loss.backward()
    assert all(p.grad is None for p in lora_parameters(model).values())
    assert len(fisher.diagonal) == 4 * LAYERS


def test_the_model_is_itself_again_after_the_block_also_after_an_error() -> None:
    model, whole = tiny("bert"), batch()
    before = model(**whole).loss
    for fail in (False, True):
        with pytest.raises(KeyError, match="mine") if fail else nullcontext(), capture_fisher(model):
            model(**whole).loss.backward()
            if fail:
                raise KeyError("mine")
        assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(**whole).loss, before)


def test_an_error_before_any_backward_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"), capture_fisher(tiny("bert")):
        raise KeyError("mine")


def test_a_capture_can_be_used_again_also_after_an_error() -> None:
    model, whole = tiny("bert"), batch()
    fisher = capture_fisher(model)
    with fisher:
        model(**whole).loss.backward()
    first = fisher.scores

    def fail() -> None:
        with fisher:
            model(**whole).loss.backward()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    with pytest.raises(FisherCaptureError, match="scores: not there yet"):
        _ = fisher.scores
    with pytest.raises(FisherCaptureError, match="diagonal: not there yet"):
        _ = fisher.diagonal
    with fisher:
        model(**whole).loss.backward()
    assert torch.equal(fisher.scores, first)


@pytest.mark.parametrize(
    ("change", "groups"),
    [({}, [2] * LAYERS), ({"lora_dropout": 0.3}, [1, 1] * LAYERS), ({"target_modules": ["key"]}, [1] * LAYERS)],
    ids=["shared", "own-dropout", "alone"],
)
def test_modules_that_read_one_input_share_a_launch_when_no_gradient_is_wanted(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], groups: list[int]
) -> None:
    seen = []

    def counted(x: Tensor, h: Any, *rest: Any, weight_grad: bool = False) -> Any:
        if not weight_grad:
            seen.append(len(h) if isinstance(h, list) else 1)
        return lora_fisher_diag(x, h, *rest, weight_grad=weight_grad)

    monkeypatch.setattr("fibecfed.sharing.lora_fisher_diag", counted)
    model, whole = tiny("bert", **change).train(), batch()
    torch.manual_seed(7)
    with capture_fisher(model) as apart:
        model(**whole).loss.backward()
    assert not seen
    torch.manual_seed(7)
    with capture_fisher(model, weight_grad=False) as together:
        model(**whole).loss.backward()
    assert seen == groups
    assert torch.equal(together.scores, apart.scores)
    assert together.module_scores.keys() == apart.module_scores.keys()
    for name, value in apart.diagonal.items():
        assert torch.equal(together.diagonal[name], value)
