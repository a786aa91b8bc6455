"""Plots of runs as matplotlib figures: built without pyplot, so that no global state of the caller is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .record import RoundRecord, RunRecord, labels

# Okabe and Ito's colours: told apart with any colour vision; markers and dashes tell the lines apart without colour.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F",
)  # fmt: skip
STYLES = (
    (BLUE, "o", "-"), (VERMILLION, "s", "--"), (GREEN, "^", "-."),
    (PURPLE, "D", ":"), (ORANGE, "v", "-"), (SKY, "P", "--"),
)  # fmt: skip
DPI = 150

X = Callable[[RunRecord, RoundRecord], float]


def accuracy_figure(record: RunRecord) -> Figure | None:
    """Global and personal accuracy against rounds and against wall seconds; None when no round was evaluated."""
    if not any(r.global_accuracy is not None or r.personal_accuracy is not None for r in record.rounds):
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_round, by_time = figure.subplots(1, 2, sharey=True)
    by_round.set_xlabel("round")
    by_round.set_ylabel("test accuracy")
    by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_time.set_xlabel("wall time since the start, initialization included (s)")
    for axes, x in ((by_round, _round), (by_time, _elapsed)):
        _line(axes, record, x, "global_accuracy", "global", *STYLES[0])
        _line(axes, record, x, "personal_accuracy", "personal", *STYLES[1])
        if record.init is not None:
            _level(axes, record.init.majority, "majority class", BLUE)
            _level(axes, record.init.personal_majority, "majority class of each device", VERMILLION)
        _finish(axes)
    if record.init is not None:
        by_time.axvspan(0.0, sum(record.init.seconds.values()), color=GREY, alpha=0.25, lw=0, label="initialization")
    by_time.set_xlim(left=0.0)
    handles, legend = by_time.get_legend_handles_labels()
    figure.legend(handles, legend, loc="outside lower center", ncols=len(legend), frameon=False)
    figure.suptitle(record.name)
    return figure


def sensitivity_figure(record: RunRecord) -> Figure | None:
    """Sensitivity of every layer, those of the GAL marked; None when it was not measured."""
    if record.init is None or not record.init.sensitivity:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    gal = set(record.init.gal)
    values = {layer: value for layer, value in sorted(record.init.sensitivity.items()) if value is not None}
    for label, inside, color, hatch in (
        ("travels (GAL)", True, BLUE, ""),
        ("stays on its device", False, "white", "///"),
    ):
        chosen = [layer for layer in values if (layer in gal) == inside]
        if chosen:
            heights = [values[layer] for layer in chosen]
            axes.bar(chosen, heights, label=label, color=color, edgecolor=BLUE, hatch=hatch)
    axes.set_xlabel("layer (transformer block)")
    axes.set_ylabel("sensitivity: relative change of the output")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.suptitle(f"{record.name}: how strongly each layer answers to noise on the embeddings")
    return figure


def scores_figure(record: RunRecord) -> Figure | None:
    """Histogram of the samples' Fisher scores on a logarithmic axis, with quantiles; None when none are known."""
    known = next((phase for phase in (record.end, record.init) if phase is not None and phase.score_histogram), None)
    if known is None or known.score_histogram is None:
        return None
    histogram = known.score_histogram
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.stairs(histogram.counts, histogram.edges, fill=True, color=SKY, edgecolor=BLUE)
    axes.set_xscale("log")
    for quantile, dashes in ((0.1, ":"), (0.5, "-"), (0.9, "--")):
        value = known.score_quantiles.get(quantile)
        if value is not None and histogram.edges[0] <= value <= histogram.edges[-1]:
            axes.axvline(value, color=VERMILLION, ls=dashes, lw=1.5, label=f"{100 * quantile:g} % below {value:.3g}")
    axes.set_xlabel("Fisher score of a sample (squared gradient norm), easy → hard")
    axes.set_ylabel("samples")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.suptitle(f"{record.name}: difficulty of the training samples")
    return figure


def compare_figure(records: Sequence[RunRecord]) -> Figure | None:
    """Global and personal accuracy of several runs against rounds, wall seconds and bytes; None without any."""
    kinds = [
        (key, label)
        for key, label in (("global_accuracy", "global test accuracy"), ("personal_accuracy", "personal test accuracy"))
        if any(getattr(entry, key) is not None for record in records for entry in record.rounds)
    ]
    if not kinds:
        return None
    scales: tuple[tuple[str, X], ...] = (
        ("round", _round),
        ("wall time, initialization included (s)", _elapsed),
        ("traffic up and down (MB)", _megabytes),
    )
    figure = Figure(figsize=(13, 1.4 + 3.4 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), len(scales), sharey="row", sharex="col", squeeze=False)
    names = labels(records)
    for row, (key, label) in zip(grid, kinds, strict=True):
        row[0].set_ylabel(label)
        for axes, (_, x) in zip(row, scales, strict=True):
            for record, name, style in zip(records, names, cycle(STYLES), strict=False):
                _line(axes, record, x, key, name, *style)
            _finish(axes)
    for axes, (label, _) in zip(grid[-1], scales, strict=True):
        axes.set_xlabel(label)
        axes.set_xlim(left=0.0)
    grid[-1][0].xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, legend = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, legend, loc="outside lower center", ncols=min(len(legend), 4), frameon=False)
    return figure


def write_plots(record: RunRecord, directory: Path) -> list[Path]:
    """Write accuracy.png, sensitivity.png and scores.png, as far as the record has what they show."""
    figures = {
        "accuracy": accuracy_figure(record),
        "sensitivity": sensitivity_figure(record),
        "scores": scores_figure(record),
    }
    return [_save(figure, directory / f"{name}.png") for name, figure in figures.items() if figure is not None]


def write_comparison(records: Sequence[RunRecord], path: Path) -> Path | None:
    """Write :func:`compare_figure` to ``path`` (PNG); None when there is nothing to show."""
    figure = compare_figure(records)
    return None if figure is None else _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI, format="png")
    return path


def _round(record: RunRecord, entry: RoundRecord) -> float:
    return entry.round


def _elapsed(record: RunRecord, entry: RoundRecord) -> float:
    return entry.elapsed


def _megabytes(record: RunRecord, entry: RoundRecord) -> float:
    before = record.init.bytes_up + record.init.bytes_down if record.init else 0
    return (before + sum(r.bytes_up + r.bytes_down for r in record.rounds if r.round <= entry.round)) / 1e6


def _line(axes: Axes, record: RunRecord, x: X, key: str, label: str, color: str, marker: str, dashes: str) -> None:
    points = [(x(record, entry), getattr(entry, key)) for entry in record.rounds if getattr(entry, key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, ls=dashes, ms=4, lw=1.5, label=label)


def _level(axes: Axes, value: float | None, label: str, color: str) -> None:
    if value is not None:
        axes.axhline(value, color=color, ls=":", lw=1.2, alpha=0.8, label=label)


def _finish(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.3)
