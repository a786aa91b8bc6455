"""The benchmarks' own rules: interleaved rounds, rehearsals, no time for a wrong result, equal results by everyone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.adapters import LITTLE, Model
from benchmarks.comparison import Comparison, Provider, Work, rehearsed, relative_error
from benchmarks.fisher_peers import make_pair, providers, truth
from benchmarks.machine import ROOT, Ceilings, ceilings, has_bf16
from benchmarks.results import read
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


def test_calls_are_rehearsed_in_cold_rounds_alone(tmp_path: Path, small_limits: None) -> None:
    rehearsed: list[str] = []
    ours = {"fibecfed": Provider(torch.ones(3).sum, rehearsal=lambda: rehearsed.append("once a round"))}
    for mode, rehearsals in (("warm", 0), ("cold", 6)):  # five rounds, and one before
        comparison = replace(compare(tmp_path / "results.csv"), modes=[mode])
        rows = comparison(Work("sum", "N=3", torch.float32, bytes=12), ours, 0.0)
        assert [row.mode for row in rows] == [mode]
        assert len(rehearsed) == rehearsals


@pytest.mark.parametrize(
    ("mode", "there", "not_there"),
    [
        ("warm", "clipped_sum", "score_samples"),
        ("all cold", "score_samples", "training_step"),
        ("cold", "masked_adamw", "clipped_sum"),
    ],
)
def test_suites_of_other_modes_are_deselected(mode: str, there: str, not_there: str) -> None:
    files = [f"benchmarks/test_{name}.py" for name in ("clipping", "scoring", "update")]
    command = [sys.executable, "-m", "pytest", "--collect-only", "--mode", mode, *files]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert there in found.stdout
    assert not_there not in found.stdout


@pytest.mark.parametrize(("capability", "dtype"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)])
def test_the_limit_of_halves_is_no_lower_than_that_of_float32(
    capability: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("benchmarks.machine.CEILING_BYTES", 1 << 10)
    monkeypatch.setattr("benchmarks.machine.MATRIX", {"cpu": 8})
    assert ceilings(CPU, torch.bfloat16).calls["product"]().dtype == dtype  # type: ignore[attr-defined]
    assert has_bf16(CPU) == (dtype == torch.bfloat16)


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
        lambda model: (Case(model, 0.5, CPU).providers(), None),
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
