"""A run over a grid is the run in one process: the same record, the same adapter; and devices with data of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fibecfed.config import RunConfig
from fibecfed.flower.server_app import app
from fibecfed.record import RunRecord, read_record, without_timings
from fibecfed.simulation import run

from ..small_run import config
from .grid import LocalGrid

pytestmark = pytest.mark.usefixtures("one_thread")


def flat(settings: RunConfig) -> dict[str, Any]:
    """The settings as a Flower context has them."""
    found: dict[str, Any] = {}
    for key, value in settings.model_dump(exclude_unset=True).items():
        found |= {f"{key}.{leaf}": one for leaf, one in value.items()} if isinstance(value, dict) else {key: value}
    return {key: "none" if value is None else value for key, value in found.items()}


def over_grid(settings: RunConfig, grid: LocalGrid) -> RunRecord:
    app(grid, Context(1, 0, {}, RecordDict(), flat(settings)))
    return read_record(Path(settings.out) / "test")


def parts(settings: RunConfig) -> list[dict[str, Any]]:
    return [{"partition-id": k, "num-partitions": 4} for k in (2, 0, 3, 1)]


def without_scores(record: RunRecord) -> RunRecord:
    """What the server of a grid may know of it."""
    bare = without_timings(record)
    assert bare.init is not None
    assert bare.end is not None
    nothing: dict[str, Any] = {"score_quantiles": {}, "score_histogram": None}
    return replace(bare, init=replace(bare.init, **nothing), end=replace(bare.end, **nothing))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["wire.dtype=int4", "wire.delta=true", "wire.error_feedback=true", "curriculum.live=true"],
        ["wire.dtype=bfloat16", "curriculum.lazy=false", "neurons.rule=lossless", "eval.every=2"],
        ["train.optimizer=sgd", "train.momentum=0.9", "neurons.selection=random", "eval.personal=false"],
        ["gal.selection=all", "gal.fraction=none", "partition.scheme=iid", "curriculum.order=random"],
    ],
    ids=lambda overrides: " ".join(overrides) or "defaults",
)
def test_a_run_over_a_grid_is_the_run_in_one_process(
    overrides: list[str], sources: tuple[Path, Path], tmp_path: Path
) -> None:
    here = run(config(sources, tmp_path / "here", *overrides))
    settings = config(sources, tmp_path / "grid", *overrides)
    there = over_grid(settings, LocalGrid(flat(settings), parts(settings)))
    assert without_scores(there) == without_scores(here)
    assert here.path is not None
    assert there.path is not None
    adapter = "adapter/adapter_model.safetensors"
    assert (there.path / adapter).read_bytes() == (here.path / adapter).read_bytes()
