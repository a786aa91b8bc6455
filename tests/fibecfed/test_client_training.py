"""What a device's training sees and does, step by step: batches, gradients, loss, modes, and what it learns live."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fibecfed import client as room
from fibecfed.batches import collate
from fibecfed.client import Client
from fibecfed.federation import Federation
from fibecfed.losses import classification_loss

from .federated import SIZES, federation, make_client

STILL = "train.lr=1e-12"  # so that nothing moves and every batch meets the same model
PLAIN = [STILL, "curriculum.enabled=false", "train.shuffle=false", "neurons.selection=all"]
pytestmark = pytest.mark.usefixtures("one_thread")


def seen_by(client: Client, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    seen: list[list[int]] = []
    batch = client.batch

    def spy(data: Any, samples: np.ndarray) -> dict[str, torch.Tensor]:
        assert data is client.train_set
        seen.append(samples.tolist())
        return batch(data, samples)

    monkeypatch.setattr(client, "batch", spy)
    return seen


def pieces(samples: np.ndarray, size: int = 4) -> list[list[int]]:
    return [samples[start : start + size].tolist() for start in range(0, len(samples), size)]


def own_loss(fed: Federation, samples: np.ndarray) -> torch.Tensor:
    return classification_loss(fed.flat.model, collate(fed.train, samples))


def test_every_epoch_goes_over_the_devices_own_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(*PLAIN, "train.epochs=3")
    client, device, told = make_client(fed), fed.devices[1], []
    seen = seen_by(client, monkeypatch)
    result = client.train(device, 1, 1.0, told.append)
    assert seen == 3 * pieces(device.train)
    assert told == [4, 1] * 3
    assert (result.samples, device.rounds) == (15, 1)
    with torch.no_grad():
        assert result.loss == pytest.approx(float(own_loss(fed, device.train).mean()), rel=1e-5)


def test_the_share_is_at_least_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(*PLAIN)
    client, device = make_client(fed), fed.devices[0]
    seen = seen_by(client, monkeypatch)
    assert client.train(device, 1, 0.01).samples == 4
    assert seen == [device.train[:4].tolist()]


def test_batches_are_shuffled_anew_by_seed_round_device_and_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    def epochs(seed: int, round_: int, index: int) -> list[tuple[int, ...]]:
        fed = federation(
            STILL, "curriculum.enabled=false", "train.group_by_length=false", "train.epochs=2", f"seed={seed}"
        )
        client, device = make_client(fed), fed.devices[0]
        device.index = index
        seen = seen_by(client, monkeypatch)
        client.train(device, round_, 1.0)
        flat = [sample for part in seen for sample in part]
        assert sorted(flat[:12]) == sorted(flat[12:]) == device.train.tolist()
        return [tuple(flat[:12]), tuple(flat[12:])]

    every = [epoch for choice in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)) for epoch in epochs(*choice)]
    assert len(set(every)) == len(every)
    assert epochs(0, 1, 0) == every[:2]


def test_batches_are_grouped_by_the_length_of_the_devices_own_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(STILL, "curriculum.enabled=false")
    client, device = make_client(fed), fed.devices[0]
    seen = seen_by(client, monkeypatch)
    client.train(device, 1, 1.0)
    lengths = sorted((fed.train.lengths[part].tolist() for part in seen), key=max)
    assert [n for part in lengths for n in sorted(part)] == sorted(fed.train.lengths[device.train].tolist())


def test_a_step_takes_the_gradient_of_its_own_batch_alone() -> None:
    fed = federation(*PLAIN)
    client, device = make_client(fed), fed.devices[1]
    client.train(device, 1, 1.0)
    found = fed.flat.grad.clone()
    fed.flat.zero_grad()
    own_loss(fed, device.train[4:]).mean().backward()
    torch.testing.assert_close(found, fed.flat.grad)


@pytest.mark.parametrize(("limit", "length"), [("0.001", 0.001), ("none", None)])
def test_gradients_are_clipped_to_the_norm_asked_for(limit: str, length: float | None) -> None:
    sgd = ["train.optimizer=sgd", "train.lr=1.0", "train.batch_size=64", f"train.max_grad_norm={limit}"]
    fed = federation(*PLAIN[1:], *sgd)
    before = fed.flat.data.detach().clone()
    gradient = torch.autograd.grad(own_loss(fed, fed.devices[0].train).mean(), [p for _, p in fed.flat.named_views()])
    make_client(fed).train(fed.devices[0], 1, 1.0)
    wanted = float(torch.cat([g.flatten() for g in gradient]).norm()) if length is None else length
    assert float((fed.flat.data.detach() - before).norm()) == pytest.approx(wanted, rel=1e-3)
    assert wanted > 0.01 or length is not None


def test_the_clipped_norm_is_of_the_rows_that_move_and_lora_plus_is_passed_on() -> None:
    sgd = ["train.optimizer=sgd", "train.lr=1.0", "train.batch_size=64", "train.epochs=1"]
    fed = federation(*PLAIN[1:-1], *sgd, "train.max_grad_norm=0.001", "train.loraplus_lr_ratio=2.0")
    client, device = make_client(fed), fed.devices[0]
    client.score(device)
    assert client._optimizer(client.mask(device), 1.0).param_groups[0]["loraplus_lr_ratio"] == 2.0
    before, mask = fed.flat.data.detach().clone(), client.mask(device)
    assert not mask.all()
    client.train(device, 1, 1.0)
    steps = (fed.flat.data.detach() - before).split([e.numel for e in fed.flat.entries])
    halved = [d / 2 if "lora_B" in e.name else d for e, d in zip(fed.flat.entries, steps, strict=True)]
    assert float(torch.cat(halved).norm()) == pytest.approx(0.001, rel=1e-3)


def test_only_the_rows_of_the_mask_move_and_are_counted() -> None:
    fed = federation("train.lr=1e-2")
    client, device = make_client(fed), fed.devices[0]
    client.score(device)
    mask, before = client.mask(device), fed.flat.data.detach().clone()
    result = client.train(device, 1, 1.0)
    moved = (fed.flat.data.detach() != before).float()
    rows = torch.segment_reduce(moved, "sum", lengths=fed.flat.row_lengths) > 0
    assert torch.equal(rows, mask)
    assert result.rows == int(mask.sum()) < fed.flat.num_rows


def test_dropout_is_drawn_by_seed_round_and_device_whatever_the_random_state() -> None:
    def loss(seed: int, round_: int, index: int, state: int = 0) -> float:
        fed = federation(*PLAIN, f"seed={seed}", dropout=0.3)
        fed.devices[0].index = index
        torch.manual_seed(state)
        return make_client(fed).train(fed.devices[0], round_, 1.0).loss

    found = [loss(*choice) for choice in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1))]
    assert len(set(found)) == len(found)
    assert loss(0, 1, 0, state=1) == found[0]


def test_live_training_learns_what_scoring_would_have_learnt() -> None:
    keys = [STILL, "curriculum.live=true", "curriculum.labels=data", "neurons.momentum=0.0", "train.epochs=2"]
    fed = federation(*keys)
    client, device = make_client(fed), fed.devices[1]
    client.score(device)
    scores, importance = device.scores, device.importance
    assert scores is not None
    assert importance is not None
    device.scores, device.importance = np.zeros_like(scores), torch.zeros_like(importance)
    client.train(device, 1, 1.0)
    assert device.scores is not None
    assert device.importance is not None
    np.testing.assert_allclose(device.scores, scores, rtol=1e-4)
    torch.testing.assert_close(device.importance, importance, rtol=1e-4, atol=1e-9)


def test_nothing_is_captured_where_nobody_asks_for_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation("curriculum.live=true", "curriculum.enabled=false", "neurons.selection=all")
    monkeypatch.setattr(room, "capture_fisher", None)
    assert make_client(fed).train(fed.devices[0], 1, 1.0).samples == SIZES[0]
    assert fed.devices[0].scores is None


@pytest.mark.parametrize(("live", "frozen"), [(False, {0, 1}), (True, set())])
def test_training_is_in_training_mode_and_freezes_below_unless_it_learns_live(live: bool, frozen: set[int]) -> None:
    fed = federation("neurons.selection=none", f"curriculum.live={str(live).lower()}", "train.batch_size=64")
    client, seen = make_client(fed, (2,)), []

    def look(module: torch.nn.Module, _: object) -> None:
        still = {entry.layer for entry, parameter in fed.flat.named_views() if not parameter.requires_grad}
        seen.append((module.training, still))

    fed.flat.model.register_forward_pre_hook(look)
    client.train(fed.devices[0], 1, 1.0)
    assert seen == [(True, frozen)]


@pytest.mark.parametrize("on", [True, False])
def test_autocast_is_where_the_configuration_says(on: bool) -> None:
    fed = federation(f"autocast={str(on).lower()}")
    client, device, seen = make_client(fed), fed.devices[0], []
    query = fed.flat.model.base_model.model.bert.encoder.layer[1].attention.self.query.base_layer
    query.register_forward_hook(lambda module, _, output: seen.append(output.dtype))
    works: list[Any] = [client.score, lambda d: client.train(d, 1, 1.0), lambda d: client.predict(d.test)]
    for work in works:
        seen.clear()
        work(device)
        assert set(seen) == {torch.bfloat16 if on else torch.float32}
