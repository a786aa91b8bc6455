"""One round and one record of a run, number by number, with devices whose training is made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fibecfed import curriculum, rounds, simulation
from fibecfed.client import Device, TrainResult
from fibecfed.initialization import Choice
from fibecfed.record import SilentObserver, from_json, to_json
from fibecfed.server import link_seconds
from fibecfed.simulation import _Simulation
from fibecfed_kernels import WirePlan

from .federated import SIZES, buffer, federation

THREE = ["partition.devices=3", "partition.min_size=1", "train.per_round=2", "gal.count=1", "gal.spectrum=false"]
pytestmark = pytest.mark.usefixtures("one_thread")
Training = Callable[[Device, int, float], TrainResult]


class Told(SilentObserver):
    """Keeps the phases that it was told of."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int, int]] = []

    def on_phase(self, name: str, done: int, total: int) -> None:
        self.phases.append((name, done, total))


def begun(monkeypatch: pytest.MonkeyPatch, *overrides: str, gal: tuple[int, ...] | None = (1,)) -> _Simulation:
    """A run after its initialization; gal: the layers that travel, None: those that it finds."""
    fed = federation(*THREE, *overrides)
    monkeypatch.setattr(simulation, "build", lambda config: fed)
    if gal is not None:
        choice = Choice(gal=gal)
        monkeypatch.setattr(rounds, "choose_layers", lambda *_: choice)
    run = _Simulation(fed.config, Told())
    run._initialize()
    return run


def train_by(run: _Simulation, monkeypatch: pytest.MonkeyPatch, training: Training) -> None:
    monkeypatch.setattr(run.fleet.client, "train", lambda device, t, share, on_batch: training(device, t, share))


def test_a_device_trains_on_the_servers_layers_and_its_own_and_the_server_takes_the_weighted_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = begun(monkeypatch)
    flat, server, store = run.flat, run.server, run.fleet.store
    server.values = torch.randn_like(server.values)
    store.rows.copy_(torch.randn_like(store.rows))
    values, rows = server.values.clone(), store.rows.clone()
    met: dict[int, torch.Tensor] = {}

    def training(device: Device, t: int, share: float) -> TrainResult:
        met[device.index] = flat.data.detach().clone()
        flat.copy_(torch.full_like(flat.data, device.index + 1.0))
        return TrainResult(1.0, 1, 1)

    train_by(run, monkeypatch, training)
    uploads: list[int] = []
    pack = run.fleet.up.pack

    def spy(flat: Any, *, num_samples: int, **others: Any) -> torch.Tensor:
        uploads.append(num_samples)
        return pack(flat, num_samples=num_samples, **others)

    monkeypatch.setattr(run.fleet.up, "pack", spy)
    drawn = run._round(1).devices
    assert drawn == server.draw(1, 3, 2) == sorted(met)
    for k in drawn:
        server.values = values
        assert torch.equal(met[k], buffer(run.fleet.fed, server, rows[k]))
    wanted = np.average([k + 1 for k in drawn], weights=[SIZES[k] for k in drawn])
    server_after = run.server.up.gather(flat)  # the round's evaluation put the new values into the buffer
    assert server_after.tolist() == pytest.approx([wanted] * len(values))
    for k in range(3):
        assert torch.equal(store.rows[k], torch.full_like(rows[k], k + 1.0) if k in drawn else rows[k])
    assert uploads == [SIZES[k] for k in drawn]


def test_other_rounds_draw_other_devices_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(seed: int) -> list[list[int]]:
        run = begun(monkeypatch, f"seed={seed}", "eval.every=99", "eval.personal=false", "train.rounds=12")
        train_by(run, monkeypatch, lambda device, t, share: TrainResult(1.0, 1, 1))
        return [run._round(t).devices for t in range(1, 9)]

    first, second = drawn(1), drawn(2)
    assert first != second
    assert len({tuple(devices) for devices in first}) == 3
    assert first == drawn(1)


def test_a_round_is_recorded_number_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(
        monkeypatch, "wire.dtype=int8", "wire.down_dtype=bfloat16", "train.rounds=3", "wire.up_mbit=1.0", gal=(0, 1)
    )
    results = [TrainResult(0.5, 10, 7), TrainResult(2.0, 30, 10)]
    train_by(run, monkeypatch, lambda device, t, share: results.pop(0))
    entry = run._round(2)
    up, down = (WirePlan(run.flat, (0, 1), dtype=dtype).nbytes for dtype in ("int8", "bfloat16"))
    assert entry.round == 2
    assert entry.loss == pytest.approx((0.5 * 10 + 2.0 * 30) / 40)
    assert (entry.samples, entry.rows_active, entry.rows_total) == (40, 8, run.flat.num_rows)
    assert entry.layers_active == 2
    assert (entry.bytes_up, entry.bytes_down) == (2 * up, 2 * down)
    assert entry.modelled_seconds == link_seconds(run.config.wire, up, down)
    assert {"pack", "train", "aggregate", "evaluate"} <= entry.seconds.keys()
    assert entry.global_accuracy is not None
    assert entry.personal_accuracy is not None


@pytest.mark.parametrize("bad", [1, 2])
def test_a_device_whose_message_is_damaged_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    run = begun(monkeypatch, "train.rounds=20")
    flat, server = run.flat, run.server
    before, pack, uploaded = server.values, run.fleet.up.pack, []

    def training(device: Device, t: int, share: float) -> TrainResult:
        flat.copy_(torch.full_like(flat.data, device.index + 1.0))
        return TrainResult(1.0, 1, 1)

    def damaging(*args: Any, **others: Any) -> torch.Tensor:
        message = pack(*args, **others)
        uploaded.append(message)
        message[-1] ^= len(uploaded) <= bad
        return message

    train_by(run, monkeypatch, training)
    monkeypatch.setattr(run.fleet.up, "pack", damaging)
    t = next(t for t in range(1, 20) if server.draw(t, 3, 2) == [1, 2])  # a device's number is not its place
    entry = run._round(t)
    assert list(entry.refused) == entry.devices[:bad]
    assert all("CRC32C" in reason for reason in entry.refused.values())
    wanted = before if bad == 2 else torch.full_like(before, entry.devices[1] + 1.0)
    assert torch.equal(server.values, wanted)
    assert from_json(to_json(entry)) == entry


def test_rounds_are_evaluated_as_often_as_asked_for_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(monkeypatch, "train.rounds=5", "eval.every=2")
    train_by(run, monkeypatch, lambda device, t, share: TrainResult(1.0, 1, 1))
    assert [t for t in range(1, 6) if run._round(t).global_accuracy is not None] == [2, 4, 5]


@pytest.mark.parametrize(
    "keys",
    [
        {"pacing": "linear", "start": 0.3, "end": 0.9},
        {"pacing": "root_p", "start": 0.2, "end": 0.8, "p": 3.0},
        {"pacing": "step", "start": 0.2, "end": 1.0, "steps": 3},
    ],
    ids=lambda keys: str(keys["pacing"]),
)
def test_the_share_of_the_data_follows_the_pacing_with_its_keys(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(monkeypatch, "train.rounds=6", "eval.every=99", *(f"curriculum.{k}={v}" for k, v in keys.items()))
    asked: list[float] = []

    def training(device: Device, t: int, share: float) -> TrainResult:
        asked.append(share)
        return TrainResult(1.0, 1, 1)

    train_by(run, monkeypatch, training)
    found = [run._round(t).data_share for t in range(1, 6)]
    more = {name: keys[name] for name in ("p", "steps") if name in keys}
    wanted = [
        curriculum.pacing(keys["pacing"], t, 6, alpha=keys["end"], beta=keys["start"], **more) for t in range(1, 6)
    ]
    assert found == wanted
    assert asked == [share for share in wanted for _ in range(2)]


def test_without_a_curriculum_all_data_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(monkeypatch, "curriculum.enabled=false")
    assert [run._share(t) for t in (1, 14)] == [1.0, 1.0]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_run_that_diverges_is_stopped_by_round_and_device(loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(monkeypatch)
    train_by(run, monkeypatch, lambda device, t, share: TrainResult(loss, 1, 1))
    with pytest.raises(FloatingPointError, match=r"round 4, device \d: the loss is (nan|inf); lower train.lr"):
        run._round(4)


def count_scorings(run: _Simulation, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    scored: list[int] = []
    score = run.fleet.client.score

    def spy(device: Device, *more: Any) -> None:
        scored.append(device.index)
        score(device, *more)

    monkeypatch.setattr(run.fleet.client, "score", spy)
    return scored


def test_a_device_is_scored_once_before_it_first_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(monkeypatch, "eval.every=99", "eval.batch_size=4")
    assert [device.scores for device in run.fleet.fed.devices] == [None] * 3
    scored = count_scorings(run, monkeypatch)

    def training(device: Device, t: int, share: float) -> TrainResult:
        assert device.scores is not None
        return TrainResult(1.0, 1, 1)

    train_by(run, monkeypatch, training)
    for t in range(1, 6):
        run._round(t)
    assert sorted(scored) == [0, 1, 2]
    assert isinstance(run.observer, Told)
    told = [phase for phase in run.observer.phases if phase[0] == "score device 0"]
    assert told == [("score device 0", done, 12) for done in (4, 8, 12)]


@pytest.mark.parametrize(("overrides", "wanted"), [([], True), (["neurons.selection=all"], False)])
def test_eager_scoring_is_before_round_1_and_only_where_needed(
    overrides: list[str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(monkeypatch, "curriculum.lazy=false", "curriculum.enabled=false", *overrides)
    assert [device.scores is not None for device in run.fleet.fed.devices] == [wanted] * 3


def test_progress_counts_up_to_the_samples_of_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(
        monkeypatch, "train.epochs=2", "train.shuffle=false", "neurons.selection=all", "curriculum.order=random"
    )
    for t, share in enumerate((0.5, 0.1)):  # of 12 samples; a batch of 4 at least
        run.fleet._train(run.fleet.fed.devices[0], t, share, run.observer.on_phase)
    assert isinstance(run.observer, Told)
    told = [phase for phase in run.observer.phases if "device 0" in phase[0] and "round" in phase[0]]
    assert told == [
        *(("round 0: device 0", done, 12) for done in (4, 6, 10, 12)),
        *(("round 1: device 0", done, 8) for done in (4, 8)),
    ]


def test_the_initialization_is_recorded_number_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(*THREE, "neurons.share=0.25", "curriculum.lazy=false")
    fed.task.train.labels[:] = 0
    fed.task.train.labels[fed.devices[1].train] = 1
    fed.task.test.labels[:] = 0
    monkeypatch.setattr(simulation, "build", lambda config: fed)
    run = _Simulation(fed.config, SilentObserver())
    init = run._initialize()
    rows = {layer: fed.flat.rows(layer).stop - fed.flat.rows(layer).start for layer in fed.flat.layers}
    assert init.gal == [max(init.sensitivity, key=lambda layer: init.sensitivity[layer] or 0.0)]
    assert init.masks == {k: [n if k in init.gal else round(n / 4), n] for k, n in rows.items()}
    head = fed.flat.num_rows - sum(rows.values())
    assert init.rows_active == head + sum(active for active, _ in init.masks.values())
    assert init.rows_total == fed.flat.num_rows
    assert init.devices == [
        {"size": 12, "labels": [12, 0, 0]},
        {"size": 5, "labels": [0, 5, 0]},
        {"size": 8, "labels": [8, 0, 0]},
    ]
    assert init.majority == 1.0
    assert init.personal_majority == pytest.approx((SIZES[0] + SIZES[2]) / sum(SIZES))
    assert (init.bytes_up, init.bytes_down) == (8 * 3 * 3, 0)
    assert init.score_quantiles[0.0] == min(float(d.scores.min()) for d in fed.devices if d.scores is not None)
    assert {"load", "init", "sensitivity", "score"} <= init.seconds.keys()


def test_what_a_message_lost_is_kept_by_the_devices_that_sent_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(monkeypatch, "wire.dtype=int4", "wire.delta=true", "wire.error_feedback=true")
    generator = torch.Generator().manual_seed(0)

    def training(device: Device, t: int, share: float) -> TrainResult:
        run.flat.copy_(run.flat.data.detach() + 0.01 * torch.randn(run.flat.numel, generator=generator))
        return TrainResult(1.0, 1, 1)

    train_by(run, monkeypatch, training)
    drawn = run._round(1).devices
    assert [bool(residual.any()) for residual in run.fleet.store.residuals] == [k in drawn for k in range(3)]
