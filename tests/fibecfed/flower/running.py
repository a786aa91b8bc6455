"""Runs over a grid without a network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from fibecfed.config import RunConfig
from fibecfed.flower.server_app import app
from fibecfed.record import RunRecord, read_record, without_timings

from .grid import LocalGrid


def flat(settings: RunConfig) -> dict[str, Any]:
    """The settings as a Flower context has them."""
    found: dict[str, Any] = {}
    for key, value in settings.model_dump(exclude_unset=True).items():
        found |= {f"{key}.{leaf}": one for leaf, one in value.items()} if isinstance(value, dict) else {key: value}
    return {key: "none" if value is None else value for key, value in found.items()}


def parts(*places: int) -> list[dict[str, Any]]:
    """The nodes' configurations, as Flower's simulation makes them."""
    return [{"partition-id": place, "num-partitions": len(places)} for place in places]


def serve(grid: LocalGrid, settings: RunConfig, **more: Any) -> RunRecord:
    app(grid, Context(1, 0, {}, RecordDict(), flat(settings) | more))
    return read_record(Path(settings.out) / "test")


def without_scores(record: RunRecord) -> RunRecord:
    """What the server of a grid may know of it."""
    bare, nothing = without_timings(record), dict[str, Any](score_quantiles={}, score_histogram=None)
    assert bare.init is not None
    assert bare.end is not None
    return replace(bare, init=replace(bare.init, **nothing), end=replace(bare.end, **nothing))


def adapter(record: RunRecord) -> bytes:
    assert record.path is not None
    return (record.path / "adapter" / "adapter_model.safetensors").read_bytes()
