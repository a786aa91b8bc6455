"""What a device does in a round, apart from the federation: order, masks, learning rate, live refresh."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fibecfed import FlatAdapter, score_samples
from fibecfed.batches import collate, encode
from fibecfed.client import Client, Device
from fibecfed.config import load_config
from fibecfed.data import Split

from .checkpoints import WORDS, tokenizer
from .tiny import CLASSES, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def make(*overrides: str, gal: tuple[int, ...] = (2,)) -> tuple[Client, Device]:
    rng = np.random.default_rng(1)
    text = [" ".join(WORDS[w] for w in rng.integers(0, 30, rng.integers(2, 9))) for _ in range(40)]
    data = encode(Split(text, None, rng.integers(0, CLASSES, 40), None), tokenizer("bert"), 32)
    config = load_config(None, ["train.batch_size=8", "eval.batch_size=16", *overrides])
    client = Client(FlatAdapter(tiny("bert")), data, data, config, gal)
    return client, Device(0, np.arange(5, 35), np.arange(5))


def test_scores_are_in_the_devices_own_order_whatever_the_buckets() -> None:
    client, device = make()
    client.score(device)
    whole = score_samples(client.model, [collate(client.train_set, device.train)])
    np.testing.assert_allclose(device.scores, whole.scores.numpy(), rtol=1e-4)
    diagonal = torch.cat([whole.diagonal[e.name].flatten() for e in client.flat.entries if e.name in whole.diagonal])
    rows = torch.segment_reduce(diagonal, "sum", lengths=client.flat.row_lengths[: client.flat.rows(None).start])
    assert device.importance is not None
    torch.testing.assert_close(device.importance[: len(rows)], rows / device.size, rtol=1e-4, atol=0)


def test_predictions_are_in_the_order_asked_for() -> None:
    client, _ = make()
    samples = np.array([7, 3, 30, 3, 12])
    one_by_one = np.concatenate([client.predict(np.array([s])) for s in samples])
    assert client.predict(samples).tolist() == one_by_one.tolist()


def test_a_mask_has_the_gal_and_the_head_whole_and_the_best_share_of_each_local_layer() -> None:
    client, device = make("neurons.share=0.25")
    client.score(device)
    mask, flat = client.mask(device), client.flat
    assert device.importance is not None
    assert mask[flat.rows(2)].all()
    assert mask[flat.rows(None)].all()
    for layer in (0, 1):
        own, importance = mask[flat.rows(layer)], device.importance[flat.rows(layer)]
        assert int(own.sum()) == round(0.25 * len(own))
        assert importance[own].min() >= importance[~own].max()


def test_live_training_refreshes_scores_and_importance() -> None:
    client, device = make("curriculum.live=true", "neurons.momentum=0.5")
    client.score(device)
    assert device.scores is not None
    before, importance = device.scores.copy(), device.importance
    client.train(device, 1, 0.5)
    seen = device.scores != before
    assert seen.sum() == 15
    assert device.importance is not None
    assert importance is not None
    assert not torch.equal(device.importance, importance)


def test_only_the_share_of_the_curriculum_is_trained_on_easiest_first() -> None:
    client, device = make("curriculum.stratified=false", "train.shuffle=false", "train.group_by_length=false")
    client.score(device)
    assert device.scores is not None
    seen: list[int] = []
    batch = client.batch

    def spy(data: Any, samples: np.ndarray) -> dict[str, torch.Tensor]:
        seen.extend(samples.tolist())
        return batch(data, samples)

    client.batch = spy  # type: ignore[method-assign]
    client.train(device, 1, 0.4)
    assert seen == device.train[np.argsort(device.scores, kind="stable")[:12]].tolist()


@pytest.mark.parametrize(("decay", "rates"), [("linear", [1.0, 0.75, 0.5, 0.25]), ("none", [1.0] * 4)])
def test_the_learning_rate_decays_with_the_rounds(decay: str, rates: list[float]) -> None:
    client, _ = make("train.rounds=4", "train.lr=1.0", f"train.lr_decay={decay}")
    assert [client._learning_rate(t) for t in (1, 2, 3, 4)] == pytest.approx(rates)


def test_training_leaves_the_model_in_eval_mode_and_the_random_state_alone() -> None:
    client, device = make("curriculum.enabled=false")
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    client.train(device, 1, 1.0)
    assert torch.equal(torch.rand(1), wanted)
    assert not client.model.training
