"""Providers of one result, compared: who gives a wrong one gets no time; the others run in interleaved rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import torch
from torch import Tensor

from . import results
from .machine import Ceilings, ceilings, facts
from .results import Row, quantile
from .timing import Call, Mode, Rounds, host_microseconds, launches, peak_bytes, rounds_within

MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Work:
    """What a benchmark is about. bytes: read and written at least once by anyone; flop: of the products."""

    benchmark: str
    shape: str
    dtype: torch.dtype
    bytes: int
    flop: int = 0


@dataclass(frozen=True)
class Provider:
    """call: what is timed. error: largest error of a result of the call against float64, None: not compared. rehearsal:
    the same call on little data (:class:`Rounds`); None where the call is so long, or has so little code, that it does
    not matter."""

    call: Call
    error: Callable[[Any], float] | None = None
    rehearsal: Call | None = None


def rehearsed(providers: Mapping[str, Provider], small: Mapping[str, Provider]) -> dict[str, Provider]:
    """Providers whose calls are rehearsed by those of the same names in ``small``."""
    return {name: replace(provider, rehearsal=small[name].call) for name, provider in providers.items()}


@dataclass(frozen=True)
class Comparison:
    """The comparison of a suite's providers in some modes; made by the fixture ``compare``."""

    pytest_benchmark: Any
    device: torch.device
    run: str
    seconds: float
    path: Path
    modes: Sequence[Mode] = MODES

    def __call__(self, work: Work, providers: Mapping[str, Provider], tolerance: float) -> list[Row]:
        """Check, time and append a row for each provider and mode; returns the rows."""
        errors = {name: p.error(p.call()) if p.error is not None else None for name, p in providers.items()}
        right = {name: p for name, p in providers.items() if (error := errors[name]) is None or error <= tolerance}
        limits = ceilings(self.device, work.dtype)
        rows: list[Row] = []
        for mode in self.modes:
            times = self._rounds(mode, right, limits)
            median = {name: quantile(values, 0.5) for name, values in times.items()}
            for name in providers:
                rows.append(self._row(work, name, mode, times.get(name), limits, median, errors[name], tolerance))
        rows = [
            self._with_costs(row, right[row.provider].call)
            if row.provider in right and row.mode == self.modes[0]
            else row
            for row in rows
        ]
        results.append(rows, self.path)
        self.pytest_benchmark.group = work.benchmark
        self.pytest_benchmark.extra_info.update({f"{row.provider}, {row.mode}: ms": row.ms50 for row in rows})
        wrong = sorted(set(providers) - set(right))
        if wrong:
            self.pytest_benchmark.extra_info["wrong"] = {name: errors[name] for name in wrong}
        return rows

    def _rounds(self, mode: Mode, providers: Mapping[str, Provider], limits: Ceilings) -> dict[str, list[float]]:
        calls = {name: p.call for name, p in providers.items()}
        calls |= {f"limit {name}": call for name, call in limits.calls.items()}
        rehearsals = {name: p.rehearsal for name, p in providers.items() if p.rehearsal is not None}
        rounds = Rounds(calls, mode, self.device, rehearsals)
        start = perf_counter()
        rounds.run()  # warm-up: compiles, and tells how long a round is
        count = rounds_within(self.seconds, perf_counter() - start)
        for times in rounds.milliseconds.values():
            times.clear()
        if mode != "warm" and self.pytest_benchmark.stats is None:
            self.pytest_benchmark.pedantic(rounds.run, rounds=count, iterations=1)  # its table shows whole rounds
        else:
            for _ in range(count):
                rounds.run()
        return rounds.milliseconds

    def _row(
        self, work: Work, name: str, mode: str, times: list[float] | None, limits: Ceilings, median: dict[str, float],
        error: float | None, tolerance: float,
    ) -> Row:  # fmt: skip
        limit = {key: median[f"limit {key}"] for key in limits.calls}
        bandwidth, rate = limits.bandwidth(limit), limits.rate(limit)
        by_bytes, by_flop = 1e3 * work.bytes / bandwidth, 1e3 * work.flop / rate
        floor = max(by_bytes, by_flop)
        ms20, ms50, ms80 = (quantile(times, share) if times else None for share in (0.2, 0.5, 0.8))
        return Row(
            run=self.run,
            benchmark=work.benchmark,
            provider=name,
            mode=mode,
            shape=work.shape,
            dtype=str(work.dtype).removeprefix("torch."),
            ms20=ms20,
            ms50=ms50,
            ms80=ms80,
            bytes=work.bytes,
            flop=work.flop,
            gbps=None if ms50 is None else work.bytes / ms50 / 1e6,
            floor_ms=floor,
            floor_percent=None if ms50 is None else 100 * floor / ms50,
            limit="bytes" if by_bytes >= by_flop else "flop",
            bandwidth_gbps=bandwidth / 1e9,
            rate_gflops=rate / 1e9,
            launches=None,
            host_us=None,
            peak_bytes=None,
            error=error,
            tolerance=tolerance,
            rounds=len(times or []),
            **facts(self.device),
        )

    def _with_costs(self, row: Row, call: Call) -> Row:
        """Launches, host time and memory, measured once, outside the timed rounds."""
        costs = {
            "launches": launches(call, self.device),
            "host_us": host_microseconds(call, self.device),
            "peak_bytes": peak_bytes(call, self.device),
        }
        return Row(**{**row.__dict__, **costs})


def relative_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """max |found − truth| / max |truth|, the largest over several tensors; ``truth`` is float64. NaN where anything
    found is NaN: it is below no tolerance."""
    errors = [
        (f.detach().cpu().double() - t.cpu()).abs().max() / t.abs().max().cpu().clamp_min(1e-300)
        for f, t in zip(found, truth, strict=True)
    ]
    return float(torch.stack(errors).max())  # torch's max keeps a NaN, Python's may drop it
