"""Rows that read back, and what is made of them: tables and plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plot, results
from benchmarks.readme import parts_table
from benchmarks.results import Row, latest, of_mode, quantile, read
from benchmarks.tables import by_rank, summary, table
from fibecfed.record import RunRecord
from tests.fibecfed.handmade import run_record


def row(provider: str = "fibecfed", ms: float | None = 2.0, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "run": "2026-01-01T00:00:00Z", "benchmark": "fisher", "provider": provider, "mode": "cold", "shape": "N=8",
        "dtype": "float32", "ms20": ms, "ms50": ms, "ms80": ms, "bytes": 1000, "flop": 8000, "gbps": 1.0,
        "floor_ms": 1.0, "floor_percent": None if ms is None else 100 / ms, "limit": "bytes", "bandwidth_gbps": 10.0,
        "rate_gflops": 100.0, "launches": None, "host_us": None, "peak_bytes": 7, "error": 1e-7, "tolerance": 1e-4,
        "rounds": 5, "device": "box", "driver": "", "threads": "2", "python": "3", "torch": "2", "triton": "3",
        "fibecfed": "0", "commit": "abc",
    }  # fmt: skip
    return Row(**{**fields, **changes})


def test_rows_are_appended_and_other_columns_refused(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    results.append([row()], path)
    results.append([row("bmm", None, launches=3)], path)
    assert read(path) == [row(), row("bmm", None, launches=3)]
    path.write_text("run,benchmark\n")
    with pytest.raises(ValueError, match="its columns are not"):
        results.append([row()], path)


def test_only_the_last_run_of_each_device_is_shown() -> None:
    old, new, gpu = row(ms=9.0, run="2025"), row(run="2026"), row(device="gpu", run="2024")
    for rows in ([old, new, gpu], [gpu, old, new]):
        assert latest([*rows, row(benchmark="update", run="2027")], "fisher") == [new, gpu]
    assert latest([row(), row("bmm"), row(shape="N=1")], "fisher") == [row(), row("bmm"), row(shape="N=1")]


def test_a_table_has_ours_its_share_of_the_limit_and_the_others_over_ours() -> None:
    rows = [row(), row("bmm", 5.0), row("einsum", 1.0), row("bad", None), row(mode="warm", ms=7.0)]
    rows += [row(shape="N=1", ms=4.0), row("bmm", 4.0, shape="N=1")]
    lines = table(rows, "fisher").splitlines()
    assert lines[2] == "| shape | dtype | fibecfed, ms | % of limit | bmm | einsum | bad |"
    assert lines[4] == "| N=8 | float32 | 2 | 50 (bytes) | 2.50 | 0.50 | wrong |"
    assert lines[5] == "| N=1 | float32 | 4 | 25 (bytes) | 1.00 |  |  |"
    with_memory = table([row(peak_bytes=2_000_000), row("bmm", 5.0, peak_bytes=3_000_000)], "fisher", memory=True)
    assert with_memory.splitlines()[5] == "| N=8 | memory at the peak | 2.0 MB |  | 1.500 |"
    with pytest.raises(ValueError, match="no cold rows"):
        table(rows, "wire: pack")


def test_parts_are_named_by_the_setting_that_differs_beside_the_runs_of_the_same_seeds() -> None:
    def runs(accuracy: float, *overrides: str) -> list[RunRecord]:
        return [run_record((accuracy + seed / 100,), f"seed={seed}", *overrides) for seed in (1, 2)]

    whole, changed = runs(0.7), runs(0.5, "curriculum.stratified=false", "gal.selection=all")
    head, _, first, second = parts_table(whole, [changed]).splitlines()
    assert "seeds 1, 2 " in head
    assert first == "| the demo's | 71.0 72.0 | 71.5 % | 76.0 77.0 | 76.5 % | 18.5 | 40 |"
    assert second.startswith("| `curriculum.stratified=false`, `gal.selection=all` | 51.0 52.0 | 51.5 % |")
    for bad in (changed[::-1], [changed[0], replace(changed[1], end=None)]):
        with pytest.raises(ValueError, match=r"not whole runs of seeds \[1, 2\]"):
            parts_table(whole, [bad])


def test_many_shapes_are_a_column_a_rank() -> None:
    rows = [row(shape="M N=1 T=2 r=16"), row("bmm", 5.0, shape="M N=1 T=2 r=16"), row(shape="M N=1 T=2 r=4", ms=4.0)]
    rows += [row("bmm", 1.0, shape="M N=1 T=2 r=4"), row(shape="M N=8 T=2 r=4", dtype="bfloat16", ms=None)]
    rows += [row(shape="M N=1 T=2 r=4", mode="warm", ms=9.0)]
    lines = by_rank(rows, "fisher", "bmm").splitlines()
    assert lines[2] == "| bmm over fibecfed (% of limit) | dtype | r=4 | r=16 |"
    assert lines[4:] == ["| M N=1 T=2 | float32 | 0.25 (25) | 2.50 (50) |", "| M N=8 T=2 | bfloat16 |  |  |"]
    with pytest.raises(ValueError, match="no all cold rows"):
        by_rank(rows, "fisher", "bmm", "all cold")


def test_a_device_without_cold_rows_shows_those_where_all_was_cold_and_says_so() -> None:
    rows = [row(), row(mode="all cold", ms=8.0), row(device="old", mode="all cold", ms=9.0), row(mode="warm", ms=1.0)]
    first, second = table([*rows, row(device="old", mode="warm", ms=1.0)], "fisher").split("\n\nold")
    assert first.splitlines()[0].endswith(", cold:")
    assert first.splitlines()[4].startswith("| N=8 | float32 | 2 |")
    assert second.splitlines()[0].endswith(", all cold:")
    assert second.splitlines()[4].startswith("| N=8 | float32 | 9 |")
    assert len(of_mode(rows, "all cold")) == 2
    assert of_mode(rows, "warm") == [rows[3]]


def test_the_summary_is_of_the_last_run_on_whatever_machine() -> None:
    line = ("scores", "fisher", "N=8", "float32", "cold", ("bmm",))
    rows = [row(device="old", run="2025"), row("bmm", 6.0, device="old", run="2025")]
    assert summary(rows, [line]).splitlines()[2] == "| scores | N=8 | 2 | 50 | bmm 3.00 | old |"
    rows += [row(device="new", run="2026", ms=4.0), row("bmm", 2.0, device="new", run="2026")]
    for order in (rows, rows[::-1]):
        assert summary(order, [line]).splitlines()[2] == "| scores | N=8 | 4 | 25 | bmm 0.50 | new |"
    with pytest.raises(ValueError, match="not measured"):
        summary(rows[:-1], [line])


def test_plots_are_written_for_each_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    rows = [row(), row("bmm + square", 5.0), row("Opacus", None), row(flop=64000, shape="N=1"), row(dtype="bfloat16")]
    results.append([*rows, row(benchmark="wire: pack", provider="fibecfed float32", flop=0)], path)
    names = {file.name for file in plot.write(path)}
    assert names == {"fisher-bars.png", "fisher-roofline.png", "wire-pack-bars.png"}
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)


def test_quantiles_are_values_that_were_measured() -> None:
    assert [quantile([5.0, 1.0, 4.0, 2.0, 3.0], share) for share in (0.2, 0.5, 0.8)] == [2.0, 3.0, 5.0]
