"""The configuration of a run that takes a second: four devices, three rounds, a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

from fibecfed.config import RunConfig, load_config


def config(sources: tuple[Path, Path], out: Path, *overrides: str) -> RunConfig:
    model, data = sources
    small = [
        "partition.devices=4",
        "partition.min_size=16",
        "train.per_round=2",
        "train.rounds=3",
        "train.batch_size=8",
    ]
    quick = ["gal.lanczos_steps=3", "gal.lanczos_devices=1", "gal.fraction=0.34", "device=cpu", "model.rank=4"]
    paths = [f"out={out}", f"data.source={data}", f"model.source={model}", "name=test"]
    return load_config(None, [*paths, *small, *quick, *overrides])
