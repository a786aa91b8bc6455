"""What a run refuses before it writes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fibecfed.config import ConfigError, RunConfig
from fibecfed.simulation import run

from .small_run import config
from .tiny import LAYERS

pytestmark = pytest.mark.usefixtures("one_thread")


def replace_devices(settings: RunConfig, devices: int) -> RunConfig:
    return settings.model_copy(update={"partition": settings.partition.model_copy(update={"devices": devices})})


def test_nothing_is_written_when_the_data_does_not_fit(sources: tuple[Path, Path], tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [{"label": "nowhere"}, {"source": str(tmp_path / "missing.csv")}]
    for change in bad:
        broken = config(sources, tmp_path / "out")
        broken = broken.model_copy(update={"data": broken.data.model_copy(update=change)})
        with pytest.raises(ValueError, match=r"nowhere|missing"):
            run(broken)
    too_many = replace_devices(config(sources, tmp_path / "out"), 100)
    with pytest.raises(ValueError, match="100"):
        run(too_many)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")
def test_a_device_that_is_not_there_is_refused_by_name(sources: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device = 'cuda'"):
        run(config(sources, tmp_path / "out", "device=cuda"))
    assert not (tmp_path / "out").exists()


def test_more_layers_than_the_model_has_are_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"gal.count = 99: wanted at most {LAYERS}, the model's layers"):
        run(config(sources, tmp_path / "out", "gal.fraction=none", "gal.count=99"))
    assert not (tmp_path / "out").exists()
