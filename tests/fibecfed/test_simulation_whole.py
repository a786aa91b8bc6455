"""A run from its start to its end: what it sums up, whom it tells, and that it goes on from any interruption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from fibecfed import fleet, rounds, simulation
from fibecfed.checkpoint import CHECKPOINT_FILE
from fibecfed.config import RunConfig
from fibecfed.phases import EndRecord, InitRecord, RoundRecord
from fibecfed.record import RecordError, RecordWriter, SilentObserver, read_record, without_timings
from fibecfed.simulation import resume, run
from fibecfed_kernels import WirePlan

from .federated import federation

KEYS = [
    "partition.devices=3",
    "partition.min_size=1",
    "train.per_round=1",
    "train.rounds=3",
    "train.lr=1e-2",
    "gal.count=1",
    "gal.lanczos_steps=2",
    "gal.lanczos_devices=2",
    "neurons.rule=lossless",
    "name=test",
]
MEASURED = ("global_accuracy", "personal_accuracy")
pytestmark = pytest.mark.usefixtures("one_thread")


class Told(SilentObserver):
    """Keeps what it was told, in order."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_start(self, config: RunConfig, total_rounds: int, info: Mapping[str, Any]) -> None:
        self.told.append((total_rounds, dict(info)))

    def on_init(self, record: InitRecord) -> None:
        self.told.append(record)

    def on_round(self, record: RoundRecord) -> None:
        self.told.append(record)

    def on_end(self, record: EndRecord) -> None:
        self.told.append(record)


@pytest.fixture(autouse=True)
def _made_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run gets a federation of its own, and local layers whose share is not the configuration's."""
    monkeypatch.setattr(simulation, "build", lambda config: federation(*KEYS, f"out={config.out}"))

    def shares(fleet: Any, gal: Any, *_: Any) -> dict[int, float]:
        return {layer: 0.125 for layer in fleet.fed.flat.layers if layer not in gal}

    monkeypatch.setattr(rounds, "neuron_shares", shares)


def config(out: Path) -> RunConfig:
    return federation(*KEYS, f"out={out}").config


def test_a_run_sums_up_what_its_phases_cost_and_tells_its_observer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer, accuracies = Told(), iter([(0.1, 0.2), (0.3, 0.4), (0.5, 0.6)])
    monkeypatch.setattr(fleet, "evaluate", lambda *_: dict(zip(MEASURED, next(accuracies), strict=True)))
    record = run(config(tmp_path), observer=observer)
    init, rounds, end = record.init, record.rounds, record.end
    assert init is not None
    assert end is not None
    info = {"path": str(tmp_path / "test"), "devices": 3, "train": 25, "test": 13}
    assert observer.told == [(3, info), init, *rounds, end]
    flat, trained = federation().flat, {k for entry in rounds for k in entry.devices}
    local = [layer for layer in flat.layers if layer not in init.gal]
    last = len(trained) * WirePlan(flat, local, dtype="float32").nbytes
    assert init.bytes_up > 0
    assert end.bytes_up == init.bytes_up + sum(entry.bytes_up for entry in rounds) + last
    assert end.bytes_down == sum(entry.bytes_down for entry in rounds)
    assert end.seconds["train"] == pytest.approx(sum(entry.seconds["train"] for entry in rounds))
    assert end.seconds["load"] == init.seconds["load"]
    assert {"export", "checkpoint"} <= end.seconds.keys()
    assert (end.global_accuracy, end.personal_accuracy) == (0.5, 0.6)
    assert (end.majority, end.personal_majority) == (init.majority, init.personal_majority)
    assert end.score_histogram is not None
    assert sum(end.score_histogram.counts) == sum((12, 5, 8)[k] for k in trained)


def test_the_shares_that_the_rule_found_are_those_that_are_trained(tmp_path: Path) -> None:
    record = run(config(tmp_path))
    flat = federation().flat
    assert record.init is not None
    rows = [flat.rows(layer) for layer in flat.layers if layer not in record.init.gal]
    still = sum(part.stop - part.start - round(0.125 * (part.stop - part.start)) for part in rows)
    assert {record.init.rows_active, *(entry.rows_active for entry in record.rounds)} == {flat.num_rows - still}
    assert record.init.neuron_shares == {layer: 0.125 for layer in flat.layers if layer not in record.init.gal}


def interrupted(out: Path, monkeypatch: pytest.MonkeyPatch, during: str) -> Path:
    """A run stopped at round 2, before its line is written, before its checkpoint, or after both."""
    write, save = RecordWriter.write, simulation.save_checkpoint

    def stop_writing(self: RecordWriter, record: Any) -> None:
        if getattr(record, "round", 0) == 2:
            raise KeyboardInterrupt
        write(self, record)

    def stop_saving(path: Path, t: int, *state: Any) -> None:
        if t == 2:
            raise KeyboardInterrupt
        save(path, t, *state)

    def stop_telling(self: Told, record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if during == "record":
            patch.setattr(RecordWriter, "write", stop_writing)
        elif during == "checkpoint":
            patch.setattr(simulation, "save_checkpoint", stop_saving)
        else:
            patch.setattr(Told, "on_round", stop_telling)
        with pytest.raises(KeyboardInterrupt):
            run(config(out), observer=Told())
    return out / "test"


@pytest.mark.parametrize("during", ["record", "checkpoint", "observer"])
def test_a_run_goes_on_from_wherever_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    run(config(tmp_path / "whole"))
    wanted = read_record(tmp_path / "whole" / "test")
    folder = interrupted(tmp_path / "cut", monkeypatch, during)
    observer = Told()
    resumed = resume(folder, observer=observer)
    assert without_timings(resumed) == without_timings(wanted)
    assert without_timings(read_record(folder)) == without_timings(wanted)
    assert observer.told[1:] == [resumed.init, *resumed.rounds, resumed.end]


def test_a_resumed_run_counts_the_seconds_from_its_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = interrupted(tmp_path, monkeypatch, "observer")
    with safe_open(folder / CHECKPOINT_FILE, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    assert float(metadata["elapsed"]) >= read_record(folder).rounds[-1].elapsed
    save_file(tensors, folder / CHECKPOINT_FILE, metadata={**metadata, "elapsed": "5000.0"})
    resumed = resume(folder)
    assert [entry.elapsed > 5000.0 for entry in resumed.rounds] == [False, False, True]


def test_a_run_interrupted_in_its_initialization_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(simulation._Simulation, "_initialize", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config(tmp_path))
    with pytest.raises(RecordError, match="before the end of the initialization"):
        resume(tmp_path / "test")
