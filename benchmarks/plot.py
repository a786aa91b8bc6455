"""`python -m benchmarks.plot` draws PNGs beside results.csv: rooflines, and bars of other providers' time over ours."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from .results import RESULTS, Row, latest, of_mode, read
from .tables import OURS

BLUE, GREY, COLORS = "#0072B2", "#888888", ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DPI = 120


def roofline(rows: Sequence[Row]) -> Figure:
    """Achieved rate over arithmetic intensity, a panel a dtype, under what the machine was measured to do at most."""
    dtypes = sorted({row.dtype for row in rows}, reverse=True)
    figure = Figure(figsize=(6.5 * len(dtypes), 4.8), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        of = [row for row in rows if row.dtype == dtype and row.ms50 is not None and row.flop]
        bandwidth = sorted(row.bandwidth_gbps for row in of)[len(of) // 2]
        rate = sorted(row.rate_gflops for row in of)[len(of) // 2]
        knee = rate / bandwidth
        low = min(min(row.flop / row.bytes for row in of), knee) / 2
        high = 2 * max(max(row.flop / row.bytes for row in of), knee)
        axes.plot([low, knee, high], [low * bandwidth, rate, rate], color=GREY, lw=2)
        axes.text(low * 1.1, low * bandwidth * 0.75, f"{bandwidth:.0f} GB/s", color=GREY)
        axes.text(high / 1.1, rate * 0.8, f"{rate:.0f} GFLOP/s", color=GREY, ha="right")
        for provider, color, marker in (
            ("bmm + square", COLORS[0], "x"),
            ("Opacus", COLORS[1], "+"),
            (OURS[0], BLUE, "o"),
        ):
            own = [row for row in of if row.provider == provider]
            points = [(row.flop / row.bytes, row.flop / row.ms50 / 1e6) for row in own if row.ms50 is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=color, label=provider)
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s", title=dtype)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, loc="lower right")
    figure.suptitle(f"{rows[0].benchmark}, {rows[0].mode}: {rows[0].device}, {rows[0].threads} threads")
    return figure


def bars(rows: Sequence[Row]) -> Figure:
    """Time of every provider over ours, a group a shape; below the line at 1 a provider is faster."""
    shapes = list(dict.fromkeys((row.shape, row.dtype) for row in rows))
    names = list(dict.fromkeys(row.provider for row in rows))
    ours = next(name for name in OURS if name in names)
    others = [name for name in names if name != ours]
    time = {(row.shape, row.dtype, row.provider): row.ms50 for row in rows}
    figure = Figure(figsize=(max(7.0, 1.3 * len(shapes)), 5.0), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(others))
    for i, name in enumerate(others):
        ratios = []
        for shape, dtype in shapes:
            own, other = time.get((shape, dtype, ours)), time.get((shape, dtype, name))
            ratios.append(math.nan if own is None or other is None else other / own)
        places = [s + (i - (len(others) - 1) / 2) * width for s in range(len(shapes))]
        axes.bar(
            places, ratios, width, label=name, color=COLORS[i % len(COLORS)], alpha=1.0 if i < len(COLORS) else 0.5
        )
    axes.axhline(1.0, color=BLUE, lw=1.5, label=ours)
    axes.set(yscale="log", ylabel=f"time / time of {ours}")
    axes.set_xticks(
        range(len(shapes)), [f"{shape}\n{dtype}" for shape, dtype in shapes], rotation=30, ha="right", fontsize=8
    )
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"{rows[0].benchmark}, {rows[0].mode}: {rows[0].device}, {rows[0].threads} threads")
    return figure


def write(path: Path = RESULTS) -> list[Path]:
    """Draw the last run of every benchmark and device in a results file, beside it; returns the files."""
    rows, written = read(path), []
    for benchmark in dict.fromkeys(row.benchmark for row in rows):
        of = of_mode(latest(rows, benchmark), "cold")
        for number, device in enumerate(dict.fromkeys(row.device for row in of)):
            own = [row for row in of if row.device == device]
            stem = "".join(c if c.isalnum() else "-" for c in benchmark).replace("--", "-") + (
                f"-{number}" if number else ""
            )
            figures = {f"{stem}-bars": bars(own)}
            if any(row.flop for row in own):
                figures[f"{stem}-roofline"] = roofline(own)
            for name, figure in figures.items():
                written.append(path.parent / f"{name}.png")
                figure.savefig(written[-1], dpi=DPI)
    return written


if __name__ == "__main__":
    for file in write(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS):
        print(file)
