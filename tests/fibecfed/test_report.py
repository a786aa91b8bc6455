"""Tables of hand-made records: what they say and what they leave out; lines of a run as it goes."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from fibecfed.config import RunConfig
from fibecfed.progress import RichObserver
from fibecfed.report import (
    common_target,
    comparison_table,
    differences,
    left_out_table,
    print_comparison,
    print_report,
    reached,
    rounds_table,
    seconds_table,
    summary_table,
)

from .handmade import init_record, round_record, run_record


def shown(*tables: RenderableType, width: int = 120) -> str:
    console = Console(file=StringIO(), width=width)
    for table in tables:
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def cells(text: str, first: str) -> list[str]:
    """The words of the first line that starts with the word ``first``."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


def test_reaching_a_target_counts_everything_spent_until_its_round_initialization_included() -> None:
    record = run_record((0.6, 0.7, 0.8))
    spent = reached(record, 0.7)
    assert spent is not None
    assert (spent.round, spent.accuracy) == (2, 0.7)
    assert spent.seconds == 24.0
    assert spent.without_evaluation == 24.0 - 2 * 3.0
    assert spent.modelled_seconds == 3.0
    assert (spent.bytes_up, spent.bytes_down) == (4_001_000, 6_000_000)


def test_reaching_a_target_takes_the_first_evaluated_round_and_the_accuracy_asked_for() -> None:
    record = run_record((0.6, None, 0.8, 0.9))
    assert [spent and spent.round for spent in (reached(record, t) for t in (0.1, 0.6, 0.61, 0.9, 0.91))] == [
        1,
        1,
        3,
        4,
        None,
    ]
    assert reached(record, 0.65, "personal") == replace(reached(record, 0.6), accuracy=pytest.approx(0.65))  # type: ignore[type-var]
    assert reached(record, 0.95, "global") is None
    assert reached(record, 0.94, "personal") is not None


@pytest.mark.parametrize(
    ("accuracies", "target"),
    [
        ([(0.6, 0.7), (0.5, 0.838)], 0.70),
        ([(0.29,), (0.9,)], 0.29),
        ([(0.7, 0.2), (0.9,)], 0.70),
        ([(0.7, None), (None,)], None),
    ],
)
def test_the_common_target_is_the_highest_whole_percent_that_every_run_reached(
    accuracies: list[tuple[float | None, ...]], target: float | None
) -> None:
    assert common_target([run_record(values) for values in accuracies]) == target


def test_a_row_a_round_shows_loss_accuracies_shares_and_bytes() -> None:
    text = shown(rounds_table(run_record((0.6, None, 0.8125))))
    assert cells(text, "1") == ["1", "0.7000", "60.0", "65.0", "60", "2", "75", "2.00", "3.00"]
    assert cells(text, "2") == ["2", "0.3500", "–", "–", "70", "2", "75", "2.00", "3.00"]
    assert cells(text, "3")[2:4] == ["81.2", "86.2"]


def test_a_loss_that_diverged_is_shown_as_absent() -> None:
    record = run_record((0.6,))
    record = replace(record, rounds=(round_record(1, 0.6, loss=None),))
    assert cells(shown(rounds_table(record)), "1")[1] == "–"


def test_seconds_are_split_by_activity_and_summed() -> None:
    record = run_record((0.6, 0.7))
    other = {"train": 5.0, "checkpoint": 2.0, "export": 0.5}
    record = replace(record, rounds=(record.rounds[0], round_record(2, 0.7, seconds=other)))
    text = shown(seconds_table(record))
    assert " ".join(cells(text, "round")) == "round init train pack aggregate evaluate other all elapsed link"
    assert cells(text, "1") == ["1", "0.5", "6.0", "0.2", "0.2", "3.0", "0.0", "10.0", "14.0", "1.5"]
    assert cells(text, "2") == ["2", "–", "5.0", "–", "–", "–", "2.5", "7.5", "24.0", "1.5"]


def test_the_summary_shows_accuracy_beside_the_majority_class_layers_traffic_and_time() -> None:
    text = shown(summary_table(run_record((0.6, 0.9, 0.8))))
    assert "80.0 %, best 90.0 %, majority class 58.0 %" in text
    assert "85.0 %, best 95.0 %, majority class 66.0 %" in text
    assert cells(text, "matthews") == ["matthews", "0.5500"]
    assert "1, 3 (the lossless rule found no gap: number by gal.default_share)" in text
    assert "9.00 MB up, 9.50 MB down" in text
    assert "28.0 s: load 1.0, train 18.0, evaluate 9.0" in text
    assert "4.0 s: load 1.0, sensitivity 3.0" in text
    assert "interrupted" not in text


@pytest.mark.parametrize(
    ("lossless", "words"),
    [
        ({}, None),
        ({"found": True, "count": 2}, "(number by the lossless rule)"),
        ({"found": False, "count": 2}, "no gap"),
        ({"found": True, "count": 3, "decides": False}, "(number by gal; the lossless rule would say 3)"),
    ],
)
def test_the_summary_says_where_the_number_of_layers_came_from(lossless: dict[str, Any], words: str | None) -> None:
    text = shown(summary_table(replace(run_record((0.6,)), init=init_record(lossless=lossless))))
    assert "1, 3" in text
    assert ("lossless" in text) == (words is not None)
    assert words is None or words in text


def test_the_summary_of_an_interrupted_run_says_so_and_adds_up_what_was_spent() -> None:
    text = shown(summary_table(run_record((0.6, 0.7, None), end=False)))
    assert "interrupted after 3 of 3 rounds" in text
    assert "6.00 MB up, 9.00 MB down" in text
    assert "34.0 s: load 1.0, sensitivity 3.0, init 1.5, train 18.0" in text


@pytest.mark.parametrize("stage", ["nothing", "init"])
def test_a_run_without_a_round_can_be_reported(stage: str) -> None:
    record = replace(run_record((0.6,), end=False), rounds=(), init=None if stage == "nothing" else init_record())
    console = Console(file=StringIO(), width=100)
    print_report(record, console)
    assert "interrupted after 0 of 1 rounds" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_comparison_has_a_row_a_run_with_its_cost_or_never() -> None:
    fast, slow = run_record((0.7, 0.8), "name=fast"), run_record((0.6, 0.7), "name=slow")
    text = shown(comparison_table([fast, slow], 0.75))
    assert "to 75.0 % global accuracy" in text
    assert cells(text, "fast") == ["fast", "80.0", "80.0", "2", "24.0", "18.0", "3.0", "4.00", "6.00"]
    assert cells(text, "slow") == ["slow", "70.0", "70.0", "never", "–", "–", "–", "–", "–"]


def test_a_comparison_chooses_a_target_and_lists_the_settings_that_differ() -> None:
    runs = [
        run_record((0.7, 0.8), "name=fast"),
        run_record((0.6, 0.72), "name=slow", "curriculum.enabled=false", "gal.count=2"),
    ]
    console = Console(file=StringIO(), width=100)
    print_comparison(runs, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "to 72.0 % global accuracy" in text
    assert "to 77.0 % personal accuracy" in text
    assert cells(text, "curriculum.enabled") == ["curriculum.enabled", "true", "false"]
    assert cells(text, "gal.count") == ["gal.count", "–", "2"]


def test_differences_name_changed_keys_alone() -> None:
    configs = [run_record((0.6,), *changes).config for changes in ((), ("name=b", "out=x", "seed=7"), ("train.lr=1",))]
    assert differences(configs) == {"seed": [42, 7, 42], "train.lr": [RunConfig().train.lr, RunConfig().train.lr, 1.0]}
    assert differences(configs[:1]) == {}


def test_notes_of_a_damaged_record_are_shown() -> None:
    record = replace(run_record((0.6,)), notes=("record.jsonl line 3 is cut off",))
    for show in (
        lambda console: print_report(record, console),
        lambda console: print_comparison([record] * 2, console),
    ):
        console = Console(file=StringIO(), width=100)
        show(console)
        assert "note: record.jsonl line 3 is cut off" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("table", [rounds_table, summary_table, seconds_table])
def test_tables_fit_80_columns(table: Any) -> None:
    record = run_record((0.6,) * 12)
    long = {"init": 1234.5, "train": 9876.5, "pack": 0.004, "aggregate": 0.5, "evaluate": 345.5, "checkpoint": 0.02}
    record = replace(record, rounds=tuple(replace(entry, seconds=long, elapsed=123456.5) for entry in record.rounds))
    text = shown(table(record), width=80)
    wide = shown(table(record), width=300)
    assert max(map(len, text.splitlines())) <= 80
    if table is not summary_table:  # its last column is prose, which may wrap
        assert len([line for line in text.splitlines() if line.split()[:1] == ["12"]]) == 1
        assert cells(text, "12") == cells(wide, "12")
        assert cells(text, "round") == cells(wide, "round")


def test_an_observer_prints_a_line_for_start_initialization_and_every_round() -> None:
    console = Console(file=StringIO(), width=60)
    record = run_record((0.6, None))
    assert record.init is not None
    assert record.end is not None
    with RichObserver(console) as observer:
        observer.on_start(record.config, 2, {"path": "runs/demo", "train": 100})
        observer.on_phase("sensitivity", 1, 20)
        observer.on_init(record.init)
        for entry in record.rounds:
            observer.on_round(entry)
        observer.on_end(record.end)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 4
    assert lines[0] == "path runs/demo, train 100"
    assert "layers 1, 3 travel" in lines[1]
    assert "50 of 80 rows" in lines[1]
    assert lines[2].startswith("round 1/2  loss 0.7000  global  60.0 %  personal  65.0 %  data  60 %  5.00 MB  10.0 s")
    assert "global     – %" in lines[3]
    assert (observer.path, observer.rounds) == (Path("runs/demo"), 2)


def test_who_was_left_out_of_what_and_why_is_shown_and_nothing_where_nobody_was() -> None:
    record = run_record((0.6, 0.7))
    assert left_out_table(record).row_count == 0
    assert record.end is not None
    first = replace(record.rounds[0], refused={3: "[bold]checksum\\"}, unevaluated={0: "late"})
    record = replace(record, rounds=(first, record.rounds[1]), end=replace(record.end, refused={4: "gone"}))
    console = Console(file=StringIO(), width=120)
    print_report(record, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [line.split() for line in text[text.index("devices left out") :].splitlines()[4:7]]
    assert rows == [
        ["1", "3", "mean", "[bold]checksum\\"],
        ["1", "0", "accuracy", "late"],
        ["end", "4", "adapter", "gone"],
    ]
