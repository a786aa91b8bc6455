"""Scores for every built-in task against a float64 batch-of-1 loop, and labels drawn from the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from fibecfed import score_samples
from fibecfed.losses import TASKS
from tests.fibecfed.test_capture import assert_close, lora_parameters
from tests.fibecfed.tiny import CLASSES, HIDDEN, VOCAB, batch, fill_b, tiny

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
Negative = Callable[[Tensor, Tensor], Tensor]  # (logits of one sample, its labels) -> −log p, written out


def regression(logits: Tensor, labels: Tensor) -> Tensor:
    return ((logits[0] - labels[0]) ** 2).sum() / 2


def next_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    log_p = logits[0].log_softmax(-1)
    return -sum(
        (log_p[t, int(labels[0, t + 1])] for t in range(labels.shape[1] - 1) if labels[0, t + 1] != -100),
        start=0.0 * log_p.sum(),
    )


def token_classes(logits: Tensor, labels: Tensor) -> Tensor:
    log_p = logits[0].log_softmax(-1)
    return -sum((log_p[t, int(y)] for t, y in enumerate(labels[0]) if y != -100), start=0.0 * log_p.sum())


def made(task: str) -> tuple[nn.Module, dict[str, Tensor], Negative]:
    """A tiny model of the task, a padded batch with some labels ignored, and its loss written out."""
    torch.manual_seed(1)
    whole = batch()
    present = whole["attention_mask"].bool()
    targets = ["query", "value"]
    if task == "causal_lm":
        base: nn.Module = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2))
        labels = torch.where(present, whole["input_ids"], -100)
        labels[1, :2] = -100  # a prompt
        labels[2] = -100  # nothing to learn
        targets, negative = ["q_proj", "v_proj"], next_tokens
    elif task == "token_classification":
        base = BertForTokenClassification(BertConfig(**SHAPE, num_labels=4))
        labels = torch.where(present, whole["input_ids"] % 4, -100)
        negative = token_classes
    else:
        base = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=2))
        labels = torch.randn(len(whole["labels"]), 2)
        negative = regression
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets)).eval()
    fill_b(model)
    return model, {**whole, "labels": labels}, negative


def loop(model: nn.Module, whole: dict[str, Tensor], negative: Negative) -> Tensor:
    double, scores = model.double(), []
    for n in range(len(whole["labels"])):
        real = whole["attention_mask"][n].bool()
        labels = whole["labels"][n : n + 1]
        labels = labels[:, real] if labels.shape[1:] == real.shape else labels.double()
        logits = double(input_ids=whole["input_ids"][n : n + 1, real]).logits
        gradients = torch.autograd.grad(negative(logits, labels), list(lora_parameters(double).values()))
        scores.append(sum(g.square().sum() for g in gradients))
    model.float()
    return torch.stack(scores)


@pytest.mark.parametrize("task", ["regression", "causal_lm", "token_classification"])
def test_scores_of_every_task_are_those_of_a_loop_over_single_samples(task: str) -> None:
    model, whole, negative = made(task)
    found = score_samples(model, [whole], sample_loss=task)  # type: ignore[arg-type]
    truth = loop(model, whole, negative)
    assert_close(found.scores, truth)
    if task == "causal_lm":
        assert found.scores[2] == 0


def test_one_value_a_sample_may_be_given_without_its_axis() -> None:
    torch.manual_seed(1)
    model = get_peft_model(
        BertForSequenceClassification(BertConfig(**SHAPE, num_labels=1)), LoraConfig(r=4, target_modules=["query"])
    ).eval()
    fill_b(model)
    whole = {**batch(), "labels": torch.randn(5)}
    flat = score_samples(model, [whole], sample_loss="regression").scores
    column = score_samples(model, [{**whole, "labels": whole["labels"][:, None]}], sample_loss="regression").scores
    assert torch.equal(flat, column)
    assert flat.min() > 0


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("regression", torch.zeros(5, dtype=torch.long)),
        ("regression", torch.zeros(5, 3)),
        ("token_classification", torch.zeros(5, dtype=torch.long)),
        ("token_classification", torch.zeros(5, 9)),
        ("causal_lm", torch.zeros(5, 8, dtype=torch.long)),
    ],
)
def test_labels_that_do_not_fit_the_task_are_refused(task: str, labels: Tensor) -> None:
    model, whole, _ = made(task)
    with pytest.raises(ValueError, match=r"logits .*, labels .*: wanted"):
        score_samples(model, [{**whole, "labels": labels}], sample_loss=task)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "bad", "most"),
    [
        ("classification", -1, CLASSES - 1),
        ("classification", CLASSES, CLASSES - 1),
        ("token_classification", 4, 3),
        ("causal_lm", VOCAB, VOCAB - 1),
    ],
)
def test_a_label_outside_the_classes_is_refused_with_its_sample(task: str, bad: int, most: int) -> None:
    model, whole = (tiny(), batch()) if task == "classification" else made(task)[:2]
    labels = whole["labels"].clone()
    labels[2] = bad
    with pytest.raises(ValueError, match=rf"^labels: {bad} in sample 2, wanted 0 … {most}, or -100 for none"):
        score_samples(model, [{**whole, "labels": labels}], sample_loss=task)  # type: ignore[arg-type]


class Fixed(nn.Module):
    """Gives the same logits whatever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **_: Tensor) -> Fixed:
        return self


def shares(drawn: Tensor, classes: int) -> Tensor:
    return torch.bincount(drawn.flatten(), minlength=classes) / drawn.numel()


def test_tokens_are_drawn_from_the_place_before_and_ignored_ones_stay() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])
    model = Fixed(p.log().expand(20_000, 3, 3))
    labels = torch.tensor([1, 2, -100]).expand(20_000, 3)
    generator = torch.Generator().manual_seed(0)
    drawn = TASKS["causal_lm"].draw(model, {"labels": labels}, generator)
    assert bool((drawn[:, 0] == 1).all())  # nothing says what the first token is
    assert bool((drawn[:, 2] == -100).all())
    torch.testing.assert_close(shares(drawn[:, 1], 3), p[0], rtol=0, atol=0.02)
    drawn = TASKS["token_classification"].draw(model, {"labels": labels}, generator)
    torch.testing.assert_close(shares(drawn[:, 1], 3), p[1], rtol=0, atol=0.02)
    assert bool((drawn[:, 2] == -100).all())


def test_values_are_drawn_with_unit_variance() -> None:
    drawn = TASKS["regression"].draw(Fixed(torch.full((20_000, 1), 3.0)), {}, torch.Generator().manual_seed(0))
    assert float(drawn.mean()) == pytest.approx(3.0, abs=0.03)
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("task", ["classification", "regression", "causal_lm", "token_classification"])
def test_a_double_model_has_a_double_loss_and_a_half_one_a_float_loss(task: str) -> None:
    shape, labels = {
        "classification": ((5, 3), torch.arange(5) % 3),
        "regression": ((5, 3), torch.ones(5, 3)),
    }.get(task, ((5, 4, 3), torch.arange(20).view(5, 4) % 3))
    for given, wanted in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert TASKS[task].loss(Fixed(torch.randn(shape).to(given)), {"labels": labels}).dtype == wanted
