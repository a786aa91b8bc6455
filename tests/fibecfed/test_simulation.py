"""The whole method end to end on a tiny BERT and a CSV file: bytes, masks, determinism, resumption, export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from fibecfed.checkpoint import CHECKPOINT_FILE
from fibecfed.client import frozen_below
from fibecfed.config import load_config
from fibecfed.federation import build
from fibecfed.initialization import Choice
from fibecfed.phases import RoundRecord
from fibecfed.record import RecordError, RunRecord, SilentObserver, read_record, without_timings
from fibecfed.simulation import _Simulation, resume, run

from .small_run import config
from .tiny import LAYERS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return run(config(sources, tmp_path_factory.mktemp("runs")))


def test_a_run_leaves_config_record_adapter_and_plots(finished: RunRecord) -> None:
    path = finished.path
    assert path is not None
    files = {p.name for p in path.iterdir()}
    assert {"config.toml", "record.jsonl", "adapter", "accuracy.png", "sensitivity.png", "scores.png"} <= files
    assert CHECKPOINT_FILE not in files
    assert without_timings(read_record(path)) == without_timings(finished)
    assert load_config(path / "config.toml") == finished.config


def test_the_record_says_what_was_decided(finished: RunRecord) -> None:
    init, end = finished.init, finished.end
    assert init is not None
    assert end is not None
    assert set(init.sensitivity) == set(range(LAYERS))
    assert init.gal == [max(init.sensitivity, key=lambda layer: init.sensitivity[layer] or 0.0)]
    spectrum = init.lossless["devices"][0]
    assert spectrum["eigenvalues"] == sorted(spectrum["eigenvalues"])
    assert not init.lossless["decides"]
    for layer, (active, rows) in init.masks.items():
        assert active == (rows if layer in init.gal else round(0.5 * rows))
    assert end.score_histogram is not None  # lazy: scores are there once devices were drawn
    assert [r.round for r in finished.rounds] == [1, 2, 3]
    assert finished.rounds[0].data_share == pytest.approx(0.5)


def test_bytes_are_those_of_the_messages(finished: RunRecord, sources: tuple[Path, Path]) -> None:
    simulation = _Simulation(finished.config, SilentObserver())
    assert finished.init is not None
    simulation._divide(Choice(gal=tuple(finished.init.gal)))
    message = simulation.server.broadcast(1)
    for entry in finished.rounds:
        assert entry.bytes_up == entry.bytes_down == 2 * message.numel()


def test_the_adapter_loads_and_is_the_model_that_was_trained(finished: RunRecord, sources: tuple[Path, Path]) -> None:
    assert finished.path is not None
    base = AutoModelForSequenceClassification.from_pretrained(sources[0], num_labels=2)
    model = PeftModel.from_pretrained(base, finished.path / "adapter").eval()
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_the_same_seed_gives_the_same_record_and_another_seed_another(
    finished: RunRecord, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    again = run(config(sources, tmp_path))
    assert without_timings(again) == without_timings(finished)
    other = run(config(sources, tmp_path, "seed=7"))
    assert other.rounds != again.rounds


class Interrupt(SilentObserver):
    """Stops the run while a round is trained, as Ctrl-C would."""

    def __init__(self, during: str) -> None:
        self.during = during

    def on_phase(self, name: str, done: int, total: int) -> None:
        if name.startswith(self.during):
            raise KeyboardInterrupt


COMPRESSED = ["wire.dtype=int4", "wire.down_dtype=bfloat16", "wire.delta=true", "wire.error_feedback=true"]


@pytest.mark.parametrize(("during", "wire"), [("round 1", []), ("round 3", []), ("round 3", COMPRESSED)])
def test_an_interrupted_run_resumes_to_the_same_record(
    finished: RunRecord, sources: tuple[Path, Path], tmp_path: Path, during: str, wire: list[str]
) -> None:
    if wire:
        finished = run(config(sources, tmp_path / "whole", *wire))
    with pytest.raises(KeyboardInterrupt):
        run(config(sources, tmp_path, *wire), observer=Interrupt(during))
    folder = tmp_path / "test"
    assert len(read_record(folder).rounds) == int(during[-1]) - 1
    resumed = resume(folder)
    assert without_timings(resumed) == without_timings(finished)
    with pytest.raises(RecordError, match="has ended"):
        resume(folder)


def test_a_checkpoint_of_another_run_is_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(config(sources, tmp_path), observer=Interrupt("round 2"))
    folder = tmp_path / "test"
    (folder / CHECKPOINT_FILE).write_bytes(b"no checkpoint")
    with pytest.raises(RecordError, match="checkpoint"):
        resume(folder)
    (folder / CHECKPOINT_FILE).unlink()
    with pytest.raises(RecordError, match="no such file"):
        resume(folder)


VARIANTS: list[list[str]] = [
    ["curriculum.lazy=false", "curriculum.live=true"],
    ["curriculum.stratified=false", "curriculum.order=hard_first", "train.shuffle=false"],
    ["curriculum.order=random", "neurons.selection=random", "gal.selection=random"],
    ["curriculum.enabled=false", "gal.selection=all"],
    ["neurons.selection=none", "gal.selection=last", "wire.dtype=bfloat16"],
    ["neurons.rule=lossless", "gal.norm=inf", "gal.fraction=none", "gal.default_share=0.3", "wire.dtype=int8"],
    [
        "train.optimizer=sgd",
        "train.momentum=0.9",
        "train.max_grad_norm=1.0",
        "train.epochs=2",
        "curriculum.labels=model",
    ],
    COMPRESSED,
    [
        "partition.scheme=iid",
        "eval.every=2",
        "eval.personal=false",
        "autocast=true",
        "gal.fraction=none",
        "gal.count=2",
    ],
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda o: o[0])
def test_every_switch_runs(sources: tuple[Path, Path], tmp_path: Path, overrides: list[str]) -> None:
    record = run(config(sources, tmp_path, "train.rounds=2", *overrides))
    assert all(isinstance(r, RoundRecord) and r.loss is not None and np.isfinite(r.loss) for r in record.rounds)
    assert record.init is not None
    if "gal.selection=all" in overrides:
        assert record.init.gal == list(range(LAYERS))
    if "gal.count=2" in overrides:
        assert record.rounds[0].layers_active == 2
        assert record.rounds[0].global_accuracy is None
    if "neurons.rule=lossless" in overrides:
        local = set(range(LAYERS)) - set(record.init.gal)
        shares = record.init.neuron_shares
        assert set(shares) == local
        for layer, (active, rows) in record.init.masks.items():
            assert active == round(shares.get(layer, 1.0) * rows)
        assert record.init.rows_active == record.rounds[0].rows_active
        assert record.path is not None
        assert without_timings(read_record(record.path)) == without_timings(record)


def test_it_learns(sources: tuple[Path, Path], tmp_path: Path) -> None:
    easy = ["train.rounds=8", "train.per_round=4", "train.epochs=4", "train.lr=1e-2", "gal.fraction=1.0"]
    record = run(config(sources, tmp_path, *easy, "partition.scheme=iid", "gal.spectrum=false", "eval.every=8"))
    assert record.end is not None
    assert record.end.global_accuracy is not None
    assert record.end.majority is not None
    assert record.end.global_accuracy > record.end.majority + 0.3


def watch_round(sources: tuple[Path, Path], tmp_path: Path, *overrides: str) -> tuple[_Simulation, RoundRecord]:
    simulation = _Simulation(config(sources, tmp_path, *overrides), SilentObserver())
    simulation._initialize()
    return simulation, simulation._round(1)


def test_local_layers_stay_on_their_device_and_frozen_rows_stand_still(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    simulation, entry = watch_round(sources, tmp_path)
    store, flat, client = simulation.fleet.store, simulation.flat, simulation.fleet.client
    for device in simulation.fleet.fed.devices:
        moved = store.rows[device.index] != store.initial
        if device.index not in entry.devices:
            assert not moved.any()
            continue
        mask = client.mask(device).repeat_interleave(flat.row_lengths)
        local = torch.cat([mask[flat.values(layer)] for layer in flat.layers if layer not in client.gal])
        assert not moved[~local].any()
        assert moved[local].float().mean() > 0.9


def test_the_global_model_has_initial_local_layers(sources: tuple[Path, Path], tmp_path: Path) -> None:
    simulation, entry = watch_round(sources, tmp_path)
    simulation.server.put()
    simulation.fleet.store.reset()
    labels = simulation.fleet.fed.task.test.labels
    accuracy = float((simulation.fleet.client.predict(np.arange(len(labels))) == labels).mean())
    assert accuracy == entry.global_accuracy


def test_backward_stops_below_the_lowest_active_layer(sources: tuple[Path, Path], tmp_path: Path) -> None:
    simulation, _ = watch_round(sources, tmp_path, "neurons.selection=none", "gal.selection=last")
    flat, client = simulation.flat, simulation.fleet.client
    seen: list[int] = []
    blocks = flat.model.base_model.model.bert.encoder.layer
    for index, block in enumerate(blocks):
        block.attention.self.query.base_layer.register_forward_hook(
            lambda module, args, output, index=index: seen.append(index) if output.requires_grad else None
        )
    batch = client.batch(simulation.fleet.fed.train, np.arange(4))
    with frozen_below(flat, LAYERS - 1):
        flat.model(**batch).loss.backward()
        inside = list(seen)
    seen.clear()
    flat.model(**batch).loss.backward()
    assert 0 not in inside
    assert len(seen) > len(inside)
    assert all(p.requires_grad for _, p in flat.named_views())


def test_one_base_model_serves_all_devices(sources: tuple[Path, Path], tmp_path: Path) -> None:
    fed = build(config(sources, tmp_path))
    frozen = [p for p in fed.flat.model.parameters() if not p.requires_grad]
    simulation = _Simulation(fed.config, SilentObserver())
    simulation._initialize()
    assert simulation.fleet.store.rows.shape == (len(fed.devices), simulation.fleet.store.initial.numel())
    assert sum(p.numel() for p in simulation.flat.model.parameters() if not p.requires_grad) == sum(
        p.numel() for p in frozen
    )
    assert replace(simulation._round(1), seconds={}).round == 1
