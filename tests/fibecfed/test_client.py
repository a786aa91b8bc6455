"""What a device does in a round, apart from the federation: order, masks, learning rate, live refresh."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fibecfed import FlatAdapter, curriculum, score_samples
from fibecfed.batches import collate, encode, length_buckets
from fibecfed.client import Client, Device, frozen_below
from fibecfed.config import load_config
from fibecfed.data import Split
from fibecfed.optim import MaskedAdamW, MaskedSGD
from fibecfed.seeds import torch_stream

from .checkpoints import WORDS, tokenizer
from .federated import federation, make_client
from .tiny import CLASSES, LAYERS, tiny

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
    known, importance = device.scores.copy(), device.importance
    device.scores -= 2 * known.max()  # the order stays, and no score is below zero by itself
    client.train(device, 1, 0.5)
    assert (device.scores >= 0).sum() == 15
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


def test_labels_drawn_by_the_model_are_other_ones_at_every_participation_of_every_device() -> None:
    client, device = make("curriculum.labels=model", "seed=9")
    device.index, device.rounds = 3, 2
    client.score(device)
    buckets = length_buckets(client.train_set, 16, device.train)
    loader = [collate(client.train_set, bucket) for bucket in buckets.batches]
    wanted = score_samples(client.model, loader, labels="model", generator=torch_stream(9, "labels", 3, 2))
    assert device.scores is not None
    assert device.scores.tolist() == wanted.scores.numpy()[buckets.inverse].tolist()


def test_importance_is_smoothed_over_participations() -> None:
    client, device = make("neurons.momentum=0.75")
    client.score(device)
    first = device.importance
    client.flat.copy_(client.flat.data.detach() * 1.5)
    client.score(device)
    alone = Device(0, device.train, device.test)
    client.score(alone)
    assert first is not None
    assert alone.importance is not None
    assert device.importance is not None
    torch.testing.assert_close(device.importance, 0.75 * first + 0.25 * alone.importance, rtol=1e-5, atol=0)
    assert not torch.allclose(first, alone.importance)


def test_a_random_mask_is_drawn_by_seed_device_and_participation() -> None:
    def drawn(seed: int, index: int, rounds: int) -> list[bool]:
        client, device = make("neurons.selection=random", f"seed={seed}")
        device.index, device.rounds = index, rounds
        return client.mask(device).tolist()

    choices = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({tuple(drawn(*choice)) for choice in choices}) == len(choices)
    assert drawn(1, 2, 3) == drawn(1, 2, 3)


@pytest.mark.parametrize(("selection", "active"), [("all", True), ("none", False)])
def test_local_layers_are_whole_or_still_where_that_is_asked_for(selection: str, active: bool) -> None:
    client, device = make(f"neurons.selection={selection}")
    mask, flat = client.mask(device), client.flat
    for layer in (0, 1):
        assert mask[flat.rows(layer)].tolist() == [active] * len(mask[flat.rows(layer)])
    assert mask[flat.rows(2)].all()
    assert mask[flat.rows(None)].all()


@pytest.mark.parametrize(
    ("overrides", "gal", "needed"),
    [
        (["curriculum.enabled=false"], (2,), True),
        (["curriculum.enabled=false"], (0, 1, 2), False),
        (["curriculum.enabled=false", "neurons.selection=all"], (2,), False),
        (["neurons.selection=all"], (2,), True),
        (["neurons.selection=all", "curriculum.order=random"], (2,), False),
        (["curriculum.order=random"], (0, 1, 2), False),
        (["curriculum.order=hard_first"], (0, 1, 2), True),
    ],
)
def test_scores_are_needed_where_neurons_or_order_are_chosen_by_them(
    overrides: list[str], gal: tuple[int, ...], needed: bool
) -> None:
    assert make(*overrides, gal=gal)[0].needs_scores == needed


@pytest.mark.parametrize("name", ["easy_first", "hard_first"])
@pytest.mark.parametrize("stratified", [True, False])
def test_the_order_is_of_the_devices_own_scores_and_labels(name: str, stratified: bool) -> None:
    client, device = make(f"curriculum.order={name}", f"curriculum.stratified={str(stratified).lower()}")
    scores = device.scores = np.random.default_rng(2).random(device.size)
    labels = client.train_set.labels[device.train]
    plain, interleaved = curriculum.order(scores, name), curriculum.stratified_order(scores, labels, name)
    assert client._order(device).tolist() == (interleaved if stratified else plain).tolist()
    assert plain.tolist() != interleaved.tolist()


def test_without_a_curriculum_or_scores_the_order_is_the_datas() -> None:
    client, device = make("curriculum.enabled=false")
    device.scores = np.random.default_rng(2).random(device.size)
    assert client._order(device).tolist() == list(range(device.size))
    unscored, device = make()
    assert unscored._order(device).tolist() == list(range(device.size))


def test_a_random_order_is_drawn_by_seed_and_device_and_stays() -> None:
    def order(seed: int, index: int, rounds: int = 0, stratified: bool = True) -> list[int]:
        client, device = make("curriculum.order=random", f"curriculum.stratified={stratified}".lower(), f"seed={seed}")
        device.index, device.rounds = index, rounds
        return client._order(device).tolist()

    assert sorted(order(0, 0)) == list(range(30))
    assert order(0, 0) == order(0, 0, rounds=4)
    assert len({tuple(order(*choice)) for choice in ((0, 0), (0, 1), (1, 0))}) == 3
    assert order(0, 0, stratified=False) != order(0, 0)


def test_a_random_order_keeps_the_label_mix_too() -> None:
    client, device = make("curriculum.order=random")
    labels = client.train_set.labels[device.train][client._order(device)]
    for share in (10, 15, 20):
        assert abs(labels[:share].mean() - labels.mean()) * share < 1


def test_the_optimizer_is_what_its_keys_say() -> None:
    adamw, device = make("train.betas=[0.5, 0.75]", "train.weight_decay=0.125")
    made = adamw._optimizer(adamw.mask(device), 0.25)
    assert isinstance(made, MaskedAdamW)
    group = made.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.25, (0.5, 0.75), 0.125)
    sgd, device = make("train.optimizer=sgd", "train.momentum=0.5", "train.weight_decay=0.125")
    made = sgd._optimizer(sgd.mask(device), 0.25)
    assert isinstance(made, MaskedSGD)
    group = made.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.25, 0.5, 0.125)
    assert torch.equal(made.mask, sgd.mask(device))


@pytest.mark.parametrize("layer", [0, 1, 2, None])
def test_exactly_the_blocks_below_the_lowest_active_one_are_frozen(layer: int | None) -> None:
    flat = make()[0].flat

    def fail() -> None:
        with frozen_below(flat, layer):
            frozen = {entry.layer for entry, parameter in flat.named_views() if not parameter.requires_grad}
            assert frozen == set(range(LAYERS if layer is None else layer))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert all(parameter.requires_grad for _, parameter in flat.named_views())


def test_predictions_are_of_the_test_set_in_eval_mode_longest_first() -> None:
    fed = federation("eval.batch_size=4")
    client, model = make_client(fed), fed.flat.model
    with torch.no_grad():
        fed.flat.data.mul_(20.0)  # so that not every sample gets one class
        wanted = model(**collate(fed.test, range(len(fed.test)))).logits.argmax(-1).tolist()
    assert len(set(wanted)) > 1
    modes: list[bool] = []
    widths: list[int] = []

    def look(module: torch.nn.Module, _: object, batch: dict[str, torch.Tensor]) -> None:
        modes.append(module.training)
        widths.append(batch["input_ids"].shape[1])

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.train()
    assert client.predict(np.arange(len(fed.test))).tolist() == wanted
    assert modes == [False] * 4
    assert widths == sorted(fed.test.lengths.tolist(), reverse=True)[::4]
    assert model.training
