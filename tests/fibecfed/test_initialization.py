"""The initialization phase: which layers travel, who is asked on which samples, and what the asking costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fibecfed import fleet
from fibecfed.client import Client
from fibecfed.federation import Federation
from fibecfed.fleet import LocalFleet
from fibecfed.initialization import Choice, choose_layers, neuron_shares
from fibecfed.lossless import Decision
from fibecfed.seeds import torch_stream
from fibecfed.stopwatch import Stopwatch

from .federated import SIZES, federation, make_client

pytestmark = pytest.mark.usefixtures("one_thread")


def silent(name: str, done: int, total: int) -> None:
    pass


def choose(fed: Federation, client: Client | None = None) -> Choice:
    return choose_layers(LocalFleet(fed, client), Stopwatch(), silent)


def decision(share: float | None) -> Decision:
    return Decision(share is not None, 1, 2, share, [0.0, 1.0], [0.5, 0.5], 0.1)


class Asked:
    """Stands in for the lossless rule: keeps what it was asked, answers with the shares in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *shares: float | None) -> None:
        self.shares, self.calls, self.starts = list(shares), [], []
        monkeypatch.setattr(fleet.lossless, "device_decision", self)

    def __call__(self, flat: object, loss: Any, *, generator: torch.Generator, **options: Any) -> Decision:
        loss()
        self.starts.append(torch.randn(4, generator=generator).tolist())
        self.calls.append(options)
        return decision(self.shares[(len(self.calls) - 1) % len(self.shares)])


def spied(fed: Federation, monkeypatch: pytest.MonkeyPatch) -> tuple[Client, list[list[int]]]:
    """A client that keeps which training samples were made a batch of."""
    client, seen = make_client(fed), []
    batch = client.batch

    def spy(data: Any, samples: np.ndarray) -> dict[str, torch.Tensor]:
        assert data is fed.train
        seen.append(sorted(samples.tolist()))
        return batch(data, samples)

    monkeypatch.setattr(client, "batch", spy)
    return client, seen


@pytest.mark.parametrize(
    ("overrides", "gal"),
    [
        (["gal.selection=all"], (0, 1, 2)),
        (["gal.selection=first", "gal.count=2"], (0, 1)),
        (["gal.selection=last", "gal.count=2"], (1, 2)),
        (["gal.selection=last", "gal.count=3"], (0, 1, 2)),
        (["gal.selection=random", "gal.count=3"], (0, 1, 2)),
        (["gal.selection=first", "gal.fraction=0.6"], (0, 1)),
        (["gal.selection=last", "gal.fraction=0.01"], (2,)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_plain_choices_take_as_many_layers_as_asked_for_and_cost_nothing(
    overrides: list[str], gal: tuple[int, ...]
) -> None:
    choice = choose(federation(*overrides, "gal.spectrum=false"))
    assert choice == Choice(gal=gal)


def test_random_layers_are_drawn_by_the_seed_in_order() -> None:
    def drawn(seed: int) -> tuple[int, ...]:
        return choose(federation("gal.selection=random", "gal.count=2", "gal.spectrum=false", f"seed={seed}")).gal

    found = [drawn(seed) for seed in range(8)]
    assert set(found) == {(0, 1), (0, 2), (1, 2)}
    assert found == [drawn(seed) for seed in range(8)]


def test_layers_without_lora_are_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet.layers, "sensitivity", lambda *_, **__: torch.tensor([1.0, 9.0, 2.0]))
    choice = choose(federation("gal.count=1", "gal.spectrum=false", layers_to_transform=[0, 2]))
    assert choice.sensitivity == {0: 1.0, 2: 2.0}
    assert choice.gal == (2,)
    fed = federation("gal.selection=last", "gal.count=1", "gal.spectrum=false", layers_to_transform=[0, 1])
    assert choose(fed).gal == (1,)


def test_sensitivity_is_the_size_weighted_mean_over_one_batch_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(
        "gal.count=1", "gal.spectrum=false", "gal.norm=inf", "gal.gamma=0.3", "gal.sensitivity_batch=7", "seed=5"
    )
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 4.0])]
    answers, asked = iter(values), []

    def sensitivity(model: object, batch: dict[str, torch.Tensor], **options: float) -> torch.Tensor:
        asked.append((len(batch["labels"]), options))
        return next(answers)

    monkeypatch.setattr(fleet.layers, "sensitivity", sensitivity)
    client, seen = spied(fed, monkeypatch)
    choice = choose(fed, client)
    wanted = sum(n * v for n, v in zip(SIZES, values, strict=True)) / sum(SIZES)
    assert list(choice.sensitivity.values()) == pytest.approx(wanted.tolist())
    assert choice.gal == (int(wanted.argmax()),)
    assert asked == [(size, {"norm": float("inf"), "gamma": 0.3}) for size in (7, 5, 7)]
    for samples, device in zip(seen, fed.devices, strict=True):
        assert len(set(samples)) == len(samples)
        assert set(samples) <= set(device.train.tolist())
    assert choice.bytes_up == 8 * 3 * 3
    assert choice.lossless == {}


def test_the_batch_of_a_device_is_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def samples(seed: int) -> list[list[int]]:
        fed = federation("gal.count=1", "gal.spectrum=false", "gal.sensitivity_batch=4", f"seed={seed}")
        client, seen = spied(fed, monkeypatch)
        choose(fed, client)
        return seen

    assert samples(1) == samples(1) != samples(2)


def test_the_lossless_rule_asks_some_devices_on_their_own_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(
        "gal.selection=first",
        "gal.fraction=none",
        "gal.default_share=0.9",
        "gal.lanczos_devices=2",
        "gal.lanczos_steps=5",
        "gal.lanczos_batch=6",
        "seed=3",
    )
    rule = Asked(monkeypatch, 0.1, None)
    client, seen = spied(fed, monkeypatch)
    choice = choose(fed, client)
    chosen = [record["device"] for record in choice.lossless["devices"]]
    assert len(set(chosen)) == 2
    assert chosen == sorted(chosen)
    assert rule.calls == [{"steps": 5, "span": None}] * 2
    for k, samples, start in zip(chosen, seen, rule.starts, strict=True):
        assert set(samples) <= set(fed.devices[k].train.tolist())
        assert len(set(samples)) == min(6, SIZES[k])
        assert start == torch.randn(4, generator=torch_stream(3, "lanczos", k)).tolist()
    first, second = (SIZES[k] for k in chosen)
    assert choice.lossless["count"] == round(3 * (0.1 * first + 0.9 * second) / (first + second))
    assert choice.lossless["found"]
    assert choice.lossless["decides"]
    assert choice.lossless["default_share"] == 0.9
    assert choice.gal == tuple(range(choice.lossless["count"]))
    assert choice.bytes_up == 8 * 2


@pytest.mark.parametrize(("shares", "count"), [((0.9, 0.2, 0.2), 2), ((None, 0.2, 0.2), 1)])
def test_the_number_of_layers_is_by_the_size_weighted_share(
    shares: tuple[float | None, ...], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Asked(monkeypatch, *shares)
    rule = ["gal.selection=last", "gal.fraction=none", "gal.lanczos_devices=3", "gal.default_share=0.1"]
    assert len(choose(federation(*rule)).gal) == count


def test_which_devices_are_asked_is_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    Asked(monkeypatch, 0.5)

    def asked(seed: int) -> tuple[int, ...]:
        fed = federation("gal.selection=last", "gal.count=1", "gal.lanczos_devices=1", f"seed={seed}")
        return tuple(record["device"] for record in choose(fed).lossless["devices"])

    found = [asked(seed) for seed in range(8)]
    assert {len(devices) for devices in found} == {1}
    assert len(set(found)) == 3
    assert found == [asked(seed) for seed in range(8)]


@pytest.mark.parametrize("number", ["gal.count=1", "gal.fraction=0.34"])
def test_where_a_number_is_given_the_rule_is_recorded_and_does_not_decide(
    number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Asked(monkeypatch, 1.0)
    choice = choose(federation("gal.selection=last", number, "gal.lanczos_devices=9"))
    assert choice.gal == (2,)
    assert not choice.lossless["decides"]
    assert choice.lossless["count"] == 3
    assert len(choice.lossless["devices"]) == 3
    assert choice.bytes_up == 8 * 3


def test_every_local_layer_has_the_share_of_the_rule_on_its_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation("neurons.share=0.7", "gal.default_share=0.2", "gal.lanczos_devices=3")
    rule = Asked(monkeypatch, 0.1, None, 0.4)
    shares = neuron_shares(LocalFleet(fed), (1,), Stopwatch(), silent)
    wanted = (SIZES[0] * 0.1 + SIZES[1] * 0.7 + SIZES[2] * 0.4) / sum(SIZES)
    assert shares == pytest.approx({0: wanted, 2: wanted})
    assert [call["span"] for call in rule.calls] == [fed.flat.values(layer) for layer in (0, 0, 0, 2, 2, 2)]


def test_eager_scoring_scores_every_device_and_says_how_far_it_is() -> None:
    fed = federation()
    assert list(LocalFleet(fed).score_all()) == list(SIZES)
    assert [len(device.scores) if device.scores is not None else 0 for device in fed.devices] == list(SIZES)
