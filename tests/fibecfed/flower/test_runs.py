"""A run over a grid is the run in one process, bit for bit, whoever has the data."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message

from fibecfed.client import Client, Device
from fibecfed.config import RunConfig
from fibecfed.data import Split, Task, load_task
from fibecfed.federation import assemble
from fibecfed.fleet import LocalFleet
from fibecfed.record import SilentObserver
from fibecfed.rounds import Run
from fibecfed.simulation import run

from ..checkpoints import WORDS
from ..small_run import config
from .grid import LocalGrid
from .running import adapter, flat, parts, serve, without_scores

pytestmark = pytest.mark.usefixtures("one_thread")
LEARNS = ["train.lr=1e-2", "train.epochs=6", "train.per_round=4", "train.rounds=4", "gal.fraction=0.67"]
LEARNS += ["partition.scheme=iid"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["wire.dtype=int4", "wire.delta=true", "wire.error_feedback=true", "curriculum.live=true"],
        ["wire.dtype=bfloat16", "curriculum.lazy=false", "neurons.rule=lossless", "eval.every=2"],
        ["train.optimizer=sgd", "train.momentum=0.9", "neurons.selection=random", "eval.personal=false"],
        ["gal.selection=all", "gal.fraction=none", "partition.scheme=iid", "curriculum.order=random"],
        LEARNS,
    ],
    ids=lambda overrides: " ".join(overrides) or "defaults",
)
def test_a_run_over_a_grid_is_the_run_in_one_process(
    overrides: list[str], sources: tuple[Path, Path], tmp_path: Path
) -> None:
    here = run(config(sources, tmp_path / "here", *overrides))
    settings = config(sources, tmp_path / "grid", *overrides)
    there = serve(LocalGrid(flat(settings), parts(2, 0, 3, 1)), settings)
    if overrides == LEARNS:
        assert len({entry.global_accuracy for entry in here.rounds}) > 2
        assert len({entry.personal_accuracy for entry in here.rounds}) > 2
    assert without_scores(there) == without_scores(here)
    assert adapter(there) == adapter(here)


def own_data(folder: Path) -> list[Path]:
    """The data of three devices: one has both classes, two have one, which is another one in each."""
    rng, paths = np.random.default_rng(5), []
    for place, kinds in enumerate((["no", "yes"], ["yes"], ["no"])):
        lines = ["words,kind"]
        for i in range(20 + 8 * place):
            words = [WORDS[w] for w in rng.integers(0, 30, rng.integers(3, 9))]
            lines.append(f"{' '.join(words)},{kinds[i % len(kinds)]}")
        paths.append(folder / f"{place}.csv")
        paths[-1].write_text("\n".join(lines))
    return paths


def joined(splits: list[Split]) -> tuple[Split, list[np.ndarray]]:
    """One split of several, and where each of them is in it."""
    ends = np.cumsum([len(split) for split in splits])
    text = [text for split in splits for text in split.text]
    whole = Split(text, None, np.concatenate([split.labels for split in splits]), None)
    return whole, [np.arange(end - len(split), end) for split, end in zip(splits, ends, strict=True)]


class Known(Run):
    """A run in one process whose devices are given."""

    def __init__(self, settings: RunConfig, tasks: list[Task]) -> None:
        train, trains = joined([task.train for task in tasks])
        test, tests = joined([task.test for task in tasks])
        devices = [Device(k, *own) for k, own in enumerate(zip(trains, tests, strict=True))]
        task = Task("known", train, test, ("no", "yes"))
        super().__init__(SilentObserver(), lambda: LocalFleet(assemble(settings, task, devices)))


@pytest.fixture
def predictions_by_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that name one class, by a hash of all their values: another model than is meant shows in accuracies."""

    def predict(self: Client, samples: np.ndarray) -> np.ndarray:
        return np.full(len(samples), zlib.crc32(self.flat.data.detach().numpy().tobytes()) & 1)

    monkeypatch.setattr(Client, "predict", predict)


@pytest.mark.usefixtures("predictions_by_the_last_bit")
def test_devices_with_data_of_their_own_are_those_of_one_process(sources: tuple[Path, Path], tmp_path: Path) -> None:
    paths = own_data(tmp_path)
    settings = config(sources, tmp_path / "grid", *LEARNS, "partition.devices=3", "train.per_round=3")
    columns = {"text": "words", "label": "kind"}
    asked = flat(settings) | {"data.source": "nowhere.csv", "data.text": "words"}
    grid = LocalGrid(asked, [{"data.source": str(path), "data.label": "kind"} for path in paths])
    there = serve(grid, settings)
    seed: dict[str, Any] = {"seed": settings.seed, "classes": ("no", "yes"), **columns}
    here = Known(
        settings.model_copy(update={"out": str(tmp_path / "here")}), [load_task(path, **seed) for path in paths]
    ).start()
    assert there.config == settings.model_copy(update={"data": there.config.data})
    assert there.config.data.source == "nodes"
    wanted, found = without_scores(here), without_scores(there)
    assert wanted.init is not None
    assert wanted.end is not None
    unknown: dict[str, Any] = {"majority": None, "personal_majority": None}
    sizes = [{"size": one["size"], "labels": []} for one in wanted.init.devices]
    assert found.init == replace(wanted.init, **unknown, devices=sizes)
    assert found.rounds == tuple(replace(entry, global_metrics={}) for entry in wanted.rounds)
    assert found.end == replace(wanted.end, **unknown)
    assert adapter(there) == adapter(here)


def test_what_leaves_a_node_is_its_answers_numbers_and_packed_adapters(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    left: dict[str, set[str]] = {}

    def see(node: int, reply: Message) -> Message:
        for name, record in reply.content.items():
            assert isinstance(record, ConfigRecord | ArrayRecord)
            left.setdefault(reply.metadata.message_type, set()).add(f"{name} {sorted(record)}")
            if isinstance(record, ConfigRecord):
                assert len(str(record["json"])) < 300  # numbers of a device, not one for each of its samples
        return reply

    settings = config(sources, tmp_path, "wire.dtype=int8", "train.rounds=1")
    grid = LocalGrid(flat(settings), parts(0, 1, 2, 3), see)
    serve(grid, settings)
    numbers, packed = "fibecfed ['json']", "adapter ['adapter']"
    assert left == {
        "query.hello": {numbers},
        "query.sensitivity": {numbers},
        "query.spectrum": {numbers},
        "train": {numbers, packed},
        "evaluate": {numbers},
        "query.last": {numbers, packed},
    }
    kept = [context.state["fibecfed"] for context in grid.contexts.values() if "fibecfed" in context.state]
    assert [sorted(one) for one in kept] == [["importance", "local", "residual", "rounds", "scores"]] * 2
