"""score_samples: scores of a whole data set, in order, with the model left as it was."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fibecfed import SampleScores, capture_fisher, score_samples
from fibecfed.losses import classification_loss, draw_classes
from tests.fibecfed.test_capture import assert_close, loop_truth
from tests.fibecfed.tiny import HIDDEN, KINDS, LAYERS, batch, tiny


@pytest.mark.parametrize("kind", KINDS)
def test_scores_order_and_diagonal_of_a_loader(kind: str) -> None:
    model, batches = tiny(kind, dropout=0.5).train(), [batch(seed=s) for s in (3, 4)]
    truths = [loop_truth(model.eval(), b) for b in batches]
    model.train()
    found = score_samples(model, batches)
    scores = torch.cat([scores for scores, _ in truths])
    assert_close(found.scores, scores)
    assert found.order.tolist() == torch.argsort(found.scores, stable=True).tolist()
    for name, value in found.diagonal.items():
        assert_close(value, truths[0][1][name] + truths[1][1][name])


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("bert").train()
    model.base_model.model.bert.encoder.layer[0].eval()
    modes = [m.training for m in model.modules()]
    model(**batch()).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    score_samples(model, [batch()])
    assert [m.training for m in model.modules()] == modes
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.equal(p.grad, gradients[name])


def test_a_sample_scores_the_same_in_any_batch() -> None:
    model, whole = tiny("llama"), batch(samples=6)
    together = score_samples(model, [whole]).scores
    halves = score_samples(model, [{k: v[i : i + 3] for k, v in whole.items()} for i in (0, 3)]).scores
    assert_close(halves, together.double())


def test_labels_from_the_model_are_seeded_and_differ_from_the_data() -> None:
    model, whole = tiny("bert"), batch(samples=8)

    def run() -> torch.Tensor:
        return score_samples(model, [whole], labels="model", generator=torch.Generator().manual_seed(5)).scores

    assert torch.equal(run(), run())
    assert not torch.allclose(run(), score_samples(model, [whole]).scores)


def test_scoring_is_what_capture_gives_for_the_same_loss() -> None:
    model, whole = tiny("bert"), batch()
    with capture_fisher(model, "sum") as fisher:
        classification_loss(model, whole).sum().backward()
    assert torch.equal(score_samples(model, [whole]).scores, fisher.scores)


def test_the_mode_comes_back_after_an_error_too() -> None:
    model = tiny("bert").train()
    with pytest.raises(ValueError, match="logits"):
        score_samples(model, [{**batch(), "labels": torch.zeros(5)}])
    assert all(module.training for module in model.modules())


def test_scoring_works_where_gradients_are_off() -> None:
    model = tiny("bert")
    with torch.no_grad():
        found = score_samples(model, [batch()]).scores
    assert torch.equal(found, score_samples(model, [batch()]).scores)


def test_progress_is_told_as_the_samples_of_each_batch() -> None:
    told: list[int] = []
    score_samples(tiny("bert"), [batch(samples=n) for n in (5, 2, 3)], on_batch=told.append)
    assert told == [5, 2, 3]


class Fixed(nn.Module):
    """Gives the same logits whatever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits)


def test_labels_are_drawn_with_the_models_own_probabilities() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0])
    drawn = draw_classes(Fixed(logits.expand(20_000, 3)), {}, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(shares, logits.softmax(0), rtol=0, atol=0.015)


def test_losses_are_float32_whatever_the_logits_are() -> None:
    logits, labels = torch.randn(4, 3).bfloat16(), torch.tensor([0, 1, 2, 1])
    found = classification_loss(Fixed(logits), {"labels": labels})
    assert found.dtype == torch.float32
    assert torch.equal(found, nn.functional.cross_entropy(logits.float(), labels, reduction="none"))


def one_short(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return classification_loss(model, batch)[:-1]


def test_bad_input_is_refused_by_name() -> None:
    model = tiny("bert")
    with pytest.raises(ValueError, match="loader"):
        score_samples(model, [])
    with pytest.raises(ValueError, match="loader: gave a batch without samples"):
        score_samples(model, [batch(), {key: value[:0] for key, value in batch().items()}])
    with pytest.raises(ValueError, match="labels"):
        score_samples(model, [batch()], labels="both")
    with pytest.raises(ValueError, match=r"sample_loss: gave shape \(\), wanted a tensor \(N,\)"):
        score_samples(model, [batch()], sample_loss=lambda m, b: m(**b).loss)
    with pytest.raises(ValueError, match="sample_loss: 4 losses for 5 samples"):
        score_samples(model, [batch()], sample_loss=one_short)
    with pytest.raises(ValueError, match=r"labels.*float"):
        score_samples(model, [{**batch(), "labels": torch.zeros(5)}])
    with pytest.raises(ValueError, match=r"logits \(5, 3\), labels torch.int64 \(5, 1\): wanted"):
        score_samples(model, [{**batch(), "labels": batch()["labels"][:, None]}])


@pytest.mark.parametrize("kind", KINDS)
def test_the_modules_and_the_layers_parts_add_up_to_the_scores(kind: str) -> None:
    model, batches = tiny(kind), [batch(seed=s) for s in (3, 4)]
    found = score_samples(model, batches)
    truth = [loop_truth(model, b)[0] for b in batches]
    assert len(found.module_scores) == 2 * LAYERS
    assert_close(torch.stack(list(found.module_scores.values())).sum(0), torch.cat(truth))
    layers = found.layer_scores()
    assert list(layers) == list(range(LAYERS))
    assert_close(torch.stack(list(layers.values())).sum(0), torch.cat(truth))
    frozen = {name: p for name, p in model.named_parameters() if ".1." in name and "lora" in name}
    sample = {k: v[:1] for k, v in batches[0].items()}
    gradients = torch.autograd.grad(classification_loss(model, sample).sum(), list(frozen.values()))
    assert float(layers[1][0]) == pytest.approx(float(sum(g.square().sum() for g in gradients)), rel=1e-4)


def test_several_draws_are_averaged() -> None:
    model, whole = tiny("bert"), batch(samples=8)

    def drawn(draws: int, generator: torch.Generator) -> SampleScores:
        return score_samples(model, [whole], labels="model", draws=draws, generator=generator)

    together, stream = drawn(3, torch.Generator().manual_seed(5)), torch.Generator().manual_seed(5)
    singles = [drawn(1, stream) for _ in range(3)]
    assert_close(together.scores, torch.stack([s.scores for s in singles]).double().mean(0), 1e-6)
    for name, value in together.diagonal.items():
        assert_close(value, torch.stack([s.diagonal[name] for s in singles]).double().mean(0), 1e-6)
    for name, value in together.module_scores.items():
        assert_close(value, torch.stack([s.module_scores[name] for s in singles]).double().mean(0), 1e-6)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"sample_loss": "seq2seq"}, "sample_loss: 'seq2seq', wanted one of classification, regression"),
        ({"draws": 2}, "draws: 2, wanted"),
        ({"draws": 0, "labels": "model"}, "draws: 0, wanted ≥ 1"),
        ({"labels": "model", "sample_loss": classification_loss}, "labels: 'model' can be drawn for classification"),
    ],
)
def test_tasks_and_draws_that_do_not_fit_are_refused_by_name(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        score_samples(tiny(), [batch()], **bad)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"loader": batch()}, TypeError, "loader: dict, wanted batches one by one"),
        ({"loader": None}, TypeError, "loader: NoneType, wanted batches"),
        ({"sample_loss": None}, TypeError, "sample_loss: NoneType, wanted a task's name or a function"),
        ({"sample_loss": lambda m, b: 1.0}, ValueError, "sample_loss: gave float, wanted a tensor"),
        ({"draws": 1.5}, TypeError, "draws: 1.5, wanted an integer"),
        ({"draws": True}, TypeError, "draws: True, wanted an integer"),
        ({"loader": [{"input_ids": batch()["input_ids"]}]}, ValueError, "batch: 'labels' is NoneType, wanted a tensor"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(changes: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        score_samples(**{"model": tiny(), "loader": [batch()], **changes})


def test_tasks_that_a_model_is_not_for_are_refused() -> None:
    model = tiny("bert")
    model.base_model.model.classifier = nn.Linear(HIDDEN, 1)
    with pytest.raises(ValueError, match=r"logits \(N, 1\): one class has nothing to tell apart"):
        score_samples(model, [{**batch(), "labels": torch.zeros(5, dtype=torch.long)}])
    model.config.is_encoder_decoder = True
    for task in ("causal_lm", "token_classification"):
        with pytest.raises(ValueError, match="sample_loss: the labels of an encoder-decoder are its decoder's inputs"):
            score_samples(model, [batch()], sample_loss=task)


def test_labels_of_any_integer_type_and_ignored_ones() -> None:
    model, whole = tiny("bert"), batch(samples=6)
    plain = score_samples(model, [whole]).scores
    assert torch.equal(score_samples(model, [{**whole, "labels": whole["labels"].int()}]).scores, plain)
    some = whole["labels"].clone()
    some[2] = -100
    drawn = score_samples(
        model, [{**whole, "labels": some}], labels="model", generator=torch.Generator().manual_seed(0)
    )
    assert drawn.scores[2] == 0
    assert (drawn.scores[[0, 1, 3, 4, 5]] > 0).all()
