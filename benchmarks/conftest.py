"""What all suites share: options, and the comparison of providers in interleaved rounds."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from .comparison import MODES, Comparison
from .results import RESULTS
from .timing import Mode


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fibecfed")
    group.addoption("--results", type=Path, default=RESULTS, help="the CSV file that rows are appended to")
    group.addoption("--on", choices=("cpu", "cuda"), default="cpu", help="the device that is measured")
    group.addoption("--shapes", choices=("few", "all"), default="few", help="how many shapes")
    group.addoption("--mode", choices=MODES, action="append", help="only this one (again: and that one)")
    group.addoption("--seconds", type=float, default=3.0, help="time for the rounds of one table and one mode")


def pytest_configure(config: pytest.Config) -> None:
    """Asked for a GPU where there is none, nothing would be measured: that is an error, not a skip."""
    config.addinivalue_line("markers", "modes(*names): a suite is measured in these modes alone")
    if config.getoption("--on") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--on cuda: torch finds no CUDA device here")


def modes_of(item: pytest.Item) -> list[Mode]:
    """The modes in which a suite is measured, of those that were asked for."""
    marker, asked = item.get_closest_marker("modes"), item.config.getoption("--mode")
    return [mode for mode in (marker.args if marker else MODES) if asked is None or mode in asked]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A suite that is measured in no mode that was asked for is not run."""
    left_out = [item for item in items if "compare" in getattr(item, "fixturenames", ()) and not modes_of(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--on"))


@pytest.fixture(scope="session")
def run_name() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Two threads at most: what a laptop's core gives, and what the README's figures were measured with."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, device: torch.device, run_name: str) -> Comparison:
    """Times providers in the rounds that pytest-benchmark makes, and appends a row for each."""
    option = request.config.getoption
    return Comparison(benchmark, device, run_name, option("--seconds"), option("--results"), modes_of(request.node))
