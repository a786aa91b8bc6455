"""Plots of hand-made records: what is drawn against what, and that nothing global is touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from fibecfed.plots import (
    BLUE,
    accuracy_figure,
    compare_figure,
    scores_figure,
    sensitivity_figure,
    write_comparison,
    write_plots,
)
from fibecfed.record import RunRecord

from .handmade import init_record, run_record


def lines_of(axes: Axes) -> dict[str, Any]:
    return {str(line.get_label()): line for line in axes.get_lines()}


def test_accuracy_is_drawn_against_rounds_and_seconds_with_majority_and_initialization() -> None:
    figure = accuracy_figure(run_record((0.6, None, 0.8)))
    assert figure is not None
    by_round, by_time = figure.axes
    for axes, x in ((by_round, [1, 3]), (by_time, [14.0, 34.0])):
        lines = lines_of(axes)
        assert list(lines["global"].get_xdata()) == x
        assert list(lines["global"].get_ydata()) == [0.6, 0.8]
        assert list(lines["personal"].get_ydata()) == pytest.approx([0.65, 0.85])
        assert set(lines["majority class"].get_ydata()) == {0.58}
        assert set(lines["majority class of each device"].get_ydata()) == {0.66}
    (span,) = by_time.patches
    assert (span.get_x(), span.get_x() + span.get_width()) == (0.0, 4.0)  # type: ignore[attr-defined]
    assert by_time.get_xlim()[0] == 0.0
    assert "(s)" in by_time.get_xlabel()
    assert by_round.get_xlabel() == "round"
    assert by_round.get_ylabel() == "test accuracy"


def test_sensitivities_are_drawn_by_layer_with_the_gal_marked() -> None:
    figure = sensitivity_figure(run_record((0.6,)))
    assert figure is not None
    (axes,) = figure.axes
    bars = {round(bar.get_x() + bar.get_width() / 2): bar for bar in axes.patches}  # type: ignore[attr-defined]
    assert {layer: bar.get_height() for layer, bar in bars.items()} == {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}  # type: ignore[attr-defined]
    assert {layer for layer, bar in bars.items() if bar.get_facecolor() == to_rgba(BLUE)} == {1, 3}
    assert {layer for layer, bar in bars.items() if bar.get_hatch()} == {0, 2}
    assert axes.get_xlabel()
    assert axes.get_ylabel()


def test_scores_are_drawn_as_a_histogram_on_a_logarithmic_axis_those_of_the_end_before_those_of_the_start() -> None:
    record = run_record((0.6,))
    assert record.end is not None
    assert record.end.score_histogram is not None
    doubled = replace(record.end.score_histogram, counts=[2 * n for n in record.end.score_histogram.counts])
    for shown_record, factor in ((record, 1), (replace(record, end=replace(record.end, score_histogram=doubled)), 2)):
        figure = scores_figure(shown_record)
        assert figure is not None
        (axes,) = figure.axes
        assert axes.get_xscale() == "log"
        (stairs,) = axes.patches
        assert np.sum(stairs.get_data().values) == factor * 8  # type: ignore[attr-defined]
    assert scores_figure(replace(record, end=None)) is not None


def test_runs_are_compared_by_rounds_seconds_and_bytes() -> None:
    runs = [run_record((0.6, 0.8), "name=a"), run_record((0.5, 0.7), "name=b")]
    figure = compare_figure(runs)
    assert figure is not None
    assert len(figure.axes) == 6
    x = [lines_of(axes)["b"].get_xdata() for axes in figure.axes[:3]]
    assert [list(values) for values in x] == [[1, 2], [14.0, 24.0], pytest.approx([5.001, 10.001])]
    assert list(lines_of(figure.axes[0])["b"].get_ydata()) == [0.5, 0.7]
    assert list(lines_of(figure.axes[3])["a"].get_ydata()) == pytest.approx([0.65, 0.85])
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(looks) == 2
    assert all("(s)" in axes.get_xlabel() or "MB" in axes.get_xlabel() for axes in figure.axes[4:])


def without_personal(record: RunRecord) -> RunRecord:
    return replace(record, rounds=tuple(replace(entry, personal_accuracy=None) for entry in record.rounds))


def test_without_personal_accuracy_only_the_global_one_is_drawn() -> None:
    record = without_personal(run_record((0.6, 0.8)))
    figure, several = accuracy_figure(record), compare_figure([record, record])
    assert figure is not None
    assert several is not None
    assert "personal" not in lines_of(figure.axes[0])
    assert len(several.axes) == 3


def test_what_a_record_does_not_have_is_not_drawn(tmp_path: Path) -> None:
    empty = replace(run_record((None, None), end=False), init=None)
    assert write_plots(empty, tmp_path) == []
    assert write_comparison([empty, empty], tmp_path / "compare.png") is None
    assert list(tmp_path.iterdir()) == []
    unmeasured = replace(empty, init=replace(init_record(sensitivity={}), score_histogram=None))
    assert write_plots(unmeasured, tmp_path) == []


def test_plots_are_written_as_png_without_touching_pyplot(tmp_path: Path) -> None:
    before, backend = dict(mpl.rcParams), mpl.get_backend()
    record = run_record((0.6, 0.8))
    written = [*write_plots(record, tmp_path), write_comparison([record, record], tmp_path / "compare.png")]
    assert [path and path.name for path in written] == ["accuracy.png", "sensitivity.png", "scores.png", "compare.png"]
    for path in written:
        assert path is not None
        assert path.read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []
    assert (dict(mpl.rcParams), mpl.get_backend()) == (before, backend)
