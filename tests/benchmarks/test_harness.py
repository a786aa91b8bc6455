"""The benchmarks' own rules: interleaved rounds, no time for a wrong result, rows that read back, tables and plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import plot, results
from benchmarks.adapters import LITTLE, Model
from benchmarks.comparison import Comparison, Provider, Work, rehearsed, relative_error
from benchmarks.fisher_peers import make_pair, providers, truth
from benchmarks.machine import Ceilings, ceilings, has_bf16
from benchmarks.results import Row, latest, of_mode, quantile, read
from benchmarks.tables import by_rank, summary, table
from benchmarks.test_fisher import packed_providers
from benchmarks.test_update import Case
from benchmarks.test_wire import aggregate_providers, load_providers, pack_providers
from benchmarks.timing import Rounds, peak_bytes, rounds_within

CPU = torch.device("cpu")


class PlainRunner:
    """As much of pytest-benchmark's fixture as a comparison uses."""

    stats: object = None

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.pedantic_rounds = 0

    def pedantic(self, call: Any, rounds: int, iterations: int) -> None:
        self.pedantic_rounds, self.stats = rounds, SimpleNamespace()
        for _ in range(rounds):
            call()


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits on small buffers: what they say is not looked at."""
    a = torch.ones(64, 64)
    calls = {"copy": a.clone, "read": a.sum, "product": lambda: a @ a}
    monkeypatch.setattr("benchmarks.comparison.ceilings", lambda device, dtype: Ceilings(calls, 2 * 64**3))
    monkeypatch.setattr("benchmarks.timing.FLUSH_BYTES", 1 << 16)


def compare(path: Path, runner: PlainRunner | None = None) -> Comparison:
    return Comparison(runner or PlainRunner(), CPU, "2026-01-01T00:00:00Z", 0.0, path)


def test_every_round_runs_every_call_once_and_changes_who_goes_first() -> None:
    order: list[str] = []
    rounds = Rounds({name: lambda name=name: order.append(name) for name in "abc"}, "all cold", CPU)
    for _ in range(4):
        rounds.run()
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in rounds.milliseconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_warm_call_comes_right_after_the_same_call_untimed() -> None:
    order: list[str] = []
    rounds = Rounds({name: lambda name=name: order.append(name) for name in "ab"}, "warm", CPU)
    rounds.run()
    assert "".join(order) == "aabb"
    assert all(len(times) == 1 for times in rounds.milliseconds.values())


def test_a_cold_call_comes_after_its_rehearsal_and_that_after_the_caches_were_filled() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    for mode, wanted in (("cold", ".-a.b"), ("all cold", ".a.b")):
        order.clear()
        rounds = Rounds(calls, mode, CPU, {"a": lambda: order.append("-")})
        rounds._flush = SimpleNamespace(sum=lambda: order.append("."))  # type: ignore[assignment]
        rounds.run()
        assert "".join(order) == wanted
        assert all(len(times) == 1 for times in rounds.milliseconds.values())


def test_the_number_of_rounds_fits_the_time_within_bounds() -> None:
    assert rounds_within(10.0, 0.5) == 20
    assert rounds_within(1.0, 10.0) == 5
    assert rounds_within(10.0, 0.0) == 100


def test_peak_memory_is_what_was_needed_at_once() -> None:
    size = 64 << 20

    def twice() -> None:
        for _ in range(2):
            torch.ones(size // 4)

    def three_at_once() -> list[torch.Tensor]:
        return [torch.ones(size // 4) for _ in range(3)]

    assert peak_bytes(twice, CPU) == size
    assert peak_bytes(three_at_once, CPU) == 3 * size


def test_a_wrong_provider_gets_a_row_and_no_time(tmp_path: Path, small_limits: None) -> None:
    runner = PlainRunner()
    work = Work("sum", "N=3", torch.float32, bytes=12, flop=3)
    x, wanted = torch.ones(3), torch.tensor(3.0, dtype=torch.float64)
    calls: list[str] = []

    def wrong() -> torch.Tensor:
        calls.append("wrong")
        return x.sum() + 1

    def error(found: torch.Tensor) -> float:
        return relative_error([found], [wanted])

    path = tmp_path / "results.csv"
    rows = compare(path, runner)(work, {"fibecfed": Provider(x.sum, error), "other": Provider(wrong, error)}, 1e-6)
    assert calls == ["wrong"]  # called for its result, never again for its time
    for row in rows:
        right = row.provider == "fibecfed"
        assert (row.ms50 is not None) == (row.gbps is not None) == (row.floor_percent is not None) == right
        assert row.error == pytest.approx(0.0 if right else 1 / 3)
    assert {(row.provider, row.mode) for row in rows} == {
        (p, m) for p in ("fibecfed", "other") for m in ("cold", "all cold", "warm")
    }
    assert runner.pedantic_rounds == 5
    assert "wrong" in runner.extra_info
    assert [replace(row, **dict.fromkeys(FLOATS)) for row in read(path)] == [
        replace(row, **dict.fromkeys(FLOATS)) for row in rows
    ]


@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_in_any_result_is_below_no_tolerance(place: int) -> None:
    truth = [torch.ones(3, dtype=torch.float64)] * 2
    found = [torch.ones(3), torch.ones(3)]
    assert relative_error(found, truth) == 0.0
    found[place] = torch.tensor([1.0, float("nan"), 1.0])
    assert not relative_error(found, truth) <= 1e9


FLOATS = ("ms20", "ms50", "ms80", "gbps", "floor_ms", "floor_percent", "bandwidth_gbps", "rate_gflops", "error")


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


def test_many_shapes_are_a_column_a_rank() -> None:
    rows = [row(shape="M N=1 T=2 r=16"), row("bmm", 5.0, shape="M N=1 T=2 r=16"), row(shape="M N=1 T=2 r=4", ms=4.0)]
    rows += [row("bmm", 1.0, shape="M N=1 T=2 r=4"), row(shape="M N=8 T=2 r=4", dtype="bfloat16", ms=None)]
    rows += [row(shape="M N=1 T=2 r=4", mode="warm", ms=9.0)]
    lines = by_rank(rows, "fisher", "bmm").splitlines()
    assert lines[2] == "| bmm over fibecfed (% of limit) | dtype | r=4 | r=16 |"
    assert lines[4:] == ["| M N=1 T=2 | float32 | 0.25 (25) | 2.50 (50) |", "| M N=8 T=2 | bfloat16 |  |  |"]
    with pytest.raises(ValueError, match="no all cold rows"):
        by_rank(rows, "fisher", "bmm", "all cold")


def test_modes_can_be_left_out(tmp_path: Path, small_limits: None) -> None:
    rehearsed: list[str] = []
    ours = {"fibecfed": Provider(torch.ones(3).sum, rehearsal=lambda: rehearsed.append("once a round"))}
    for mode, rehearsals in (("warm", 0), ("cold", 6)):  # five rounds, and one before
        comparison = replace(compare(tmp_path / "results.csv"), only=[mode])
        rows = comparison(Work("sum", "N=3", torch.float32, bytes=12), ours, 0.0)
        assert [row.mode for row in rows] == [mode]
        assert len(rehearsed) == rehearsals
    with pytest.raises(pytest.skip.Exception):
        comparison(Work("sum", "N=3", torch.float32, bytes=12), {}, 0.0, modes=("warm",))


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


@pytest.mark.parametrize(("capability", "dtype"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)])
def test_the_limit_of_halves_is_no_lower_than_that_of_float32(
    capability: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("benchmarks.machine.CEILING_BYTES", 1 << 10)
    monkeypatch.setattr("benchmarks.machine.MATRIX", {"cpu": 8})
    assert ceilings(CPU, torch.bfloat16).calls["product"]().dtype == dtype  # type: ignore[attr-defined]
    assert has_bf16(CPU) == (dtype == torch.bfloat16)


def test_plots_are_written_for_each_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    rows = [row(), row("bmm + square", 5.0), row("Opacus", None), row(flop=64000, shape="N=1"), row(dtype="bfloat16")]
    results.append([*rows, row(benchmark="wire: pack", provider="fibecfed float32", flop=0)], path)
    names = {file.name for file in plot.write(path)}
    assert names == {"fisher-bars.png", "fisher-roofline.png", "wire-pack-bars.png"}
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)


def test_quantiles_are_values_that_were_measured() -> None:
    assert [quantile([5.0, 1.0, 4.0, 2.0, 3.0], share) for share in (0.2, 0.5, 0.8)] == [2.0, 3.0, 5.0]


@pytest.mark.parametrize("name", providers())
def test_every_provider_computes_the_same_scores_and_diagonals(name: str) -> None:
    pair = make_pair(5, 7, 12, 3, torch.float32, CPU)
    found, wanted = providers()[name](pair), truth(pair)
    assert relative_error(found, wanted[: len(found)]) < 1e-5
    assert len(found) == (1 if "scores only" in name else 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: packed_providers(model.d, 3, 9, CPU),
        lambda model: pack_providers(model, 1, CPU),
        lambda model: load_providers(model, 2, CPU),
        lambda model: aggregate_providers(model, CPU),
        lambda model: (Case(model, 0.5, CPU).providers(0.5), None),
    ],
    ids=["packed", "pack", "load", "aggregate", "update"],
)
def test_every_call_has_a_rehearsal_of_its_own_kind(make: Any) -> None:
    large, little = make(Model("large", 2, 24, 4))[0], make(LITTLE)[0]
    for name, provider in rehearsed(large, little).items():
        assert provider.call is large[name].call
        assert provider.rehearsal is little[name].call is not None
    with pytest.raises(KeyError):
        rehearsed(large, {})


@pytest.mark.parametrize("active", [1.0, 0.3])
def test_every_optimizer_makes_the_same_first_step(active: float) -> None:
    case = Case(Model("tiny", 2, 16, 4), active, CPU)
    peers = [case.torch_adamw(kind) for kind in ("fused", "foreach", "for-loop")] if active == 1.0 else []
    for provider in (case.masked(), case.masked("reference"), *peers):
        assert provider.error is not None
        assert provider.error(provider.call()) < 1e-6
    assert case.bytes == 28 * int(case.values.sum())
