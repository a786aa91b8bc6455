"""Shared by the driver's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from .checkpoints import WORDS, checkpoint


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models as small as the tests' a second thread only waits, and spins while it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny checkpoint, and a data set whose class is told by one of two words."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    lines = ["text,label"]
    for i in range(160):
        words = [WORDS[w] for w in rng.integers(2, 30, rng.integers(3, 9))]
        words.insert(int(rng.integers(len(words))), WORDS[i % 2])
        lines.append(f"{' '.join(words)},{i % 2}")
    (folder / "data.csv").write_text("\n".join(lines))
    return checkpoint(folder / "model", "bert"), folder / "data.csv"
