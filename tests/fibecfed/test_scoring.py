"""score_samples: scores of a whole data set, in order, with the model left as it was."""

from __future__ import annotations

import pytest
import torch

from fibecfed import capture_fisher, score_samples
from fibecfed.scoring import classification_loss
from tests.fibecfed.test_capture import assert_close, loop_truth
from tests.fibecfed.tiny import KINDS, batch, tiny


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


def test_bad_input_is_refused_by_name() -> None:
    model = tiny("bert")
    with pytest.raises(ValueError, match="loader"):
        score_samples(model, [])
    with pytest.raises(ValueError, match="labels"):
        score_samples(model, [batch()], labels="both")
    with pytest.raises(ValueError, match="sample_loss"):
        score_samples(model, [batch()], sample_loss=lambda m, b: m(**b).loss)
    with pytest.raises(ValueError, match=r"labels.*float"):
        score_samples(model, [{**batch(), "labels": torch.zeros(5)}])
