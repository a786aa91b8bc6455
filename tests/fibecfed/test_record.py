"""The record of a run: strict JSON there and back, interruptions, and refusals that name file, line and field."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fibecfed.config import ConfigError
from fibecfed.record import (
    EndRecord,
    InitRecord,
    RecordError,
    RecordWriter,
    RoundRecord,
    from_json,
    labels,
    new_run_dir,
    read_record,
    rewrite_record,
    to_json,
    without_timings,
)

from .handmade import SCORES, end_record, init_record, round_record, run_record, write_run


def strict(line: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(
    ("phase", "record"),
    [
        ("init", init_record()),
        ("init", init_record(sensitivity={}, lossless={}, majority=None)),
        ("round", round_record(1, 0.7)),
        ("round", round_record(2, None)),
        ("end", end_record(0.8)),
    ],
)
def test_a_line_reads_back_to_an_equal_record(phase: str, record: InitRecord | RoundRecord | EndRecord) -> None:
    line = to_json(record)
    assert "\n" not in line
    assert strict(line)["phase"] == phase
    assert from_json(line) == record


def test_layers_and_quantiles_keep_their_types() -> None:
    read = from_json(to_json(init_record()))
    assert isinstance(read, InitRecord)
    assert {type(layer) for layer in (*read.sensitivity, *read.masks)} == {int}
    assert {type(share) for share in read.score_quantiles} == {float}


def test_what_is_no_number_is_null() -> None:
    record = round_record(1, 0.7, loss=math.nan, global_metrics={"f1": math.inf, "matthews": -math.inf})
    assert strict(to_json(record))["loss"] is None
    assert from_json(to_json(record)) == replace(record, loss=None, global_metrics={"f1": None, "matthews": None})


def test_numbers_of_numpy_are_written_as_numbers() -> None:
    changes = {
        "bytes_up": np.int64(7),
        "devices": [np.int64(3)],
        "data_share": np.float32(0.25),
        "loss": np.float32("nan"),
    }
    expected = round_record(1, 0.5, bytes_up=7, devices=[3], data_share=0.25, loss=None)
    assert from_json(to_json(round_record(1, 0.5, **changes))) == expected


def test_scores_are_kept_as_quantiles_and_a_histogram_that_counts_every_positive_score() -> None:
    record = init_record()
    assert record.score_quantiles[0.5] == pytest.approx(np.quantile(SCORES, 0.5))
    assert (record.score_quantiles[0.0], record.score_quantiles[1.0]) == (min(SCORES), max(SCORES))
    histogram = record.score_histogram
    assert histogram is not None
    assert sum(histogram.counts) == len(SCORES)
    assert len(histogram.edges) == len(histogram.counts) + 1
    for score in SCORES:
        bin_of_score = np.searchsorted(histogram.edges, score, side="right") - 1
        assert histogram.counts[bin_of_score] > 0


@pytest.mark.parametrize(
    ("scores", "counted"), [([2.0, 2.0], 2), ([0.0, 1.0, math.nan, math.inf], 1), ([1e-45, 1e38], 2)]
)
def test_odd_scores_make_a_histogram_of_those_that_have_a_logarithm(scores: list[float], counted: int) -> None:
    record = EndRecord.from_scores(
        scores, **{**end_record(0.5).__dict__, "score_quantiles": {}, "score_histogram": None}
    )
    assert record.score_histogram is not None
    assert sum(record.score_histogram.counts) == counted
    assert all(np.diff(record.score_histogram.edges) > 0)


@pytest.mark.parametrize("scores", [[], [math.nan]])
def test_no_scores_make_no_histogram(scores: list[float]) -> None:
    record = InitRecord.from_scores(scores, gal=[], rows_active=0, rows_total=0, seconds={}, bytes_up=0, bytes_down=0)
    assert (record.score_quantiles, record.score_histogram) == ({}, None)


def test_scores_of_zero_alone_have_quantiles_but_no_histogram() -> None:
    record = InitRecord.from_scores([0.0], gal=[], rows_active=0, rows_total=0, seconds={}, bytes_up=0, bytes_down=0)
    assert record.score_quantiles[0.5] == 0.0
    assert record.score_histogram is None


def test_a_written_run_reads_back_to_an_equal_one(tmp_path: Path) -> None:
    record = run_record((0.6, None, 0.8), "model.rank=2")
    folder = write_run(tmp_path / "trial", record)
    assert read_record(folder) == replace(record, path=folder)
    assert read_record(folder).name == "trial"


def test_a_run_cut_anywhere_in_its_last_line_keeps_every_round_before_and_says_so(tmp_path: Path) -> None:
    record = run_record((0.6, 0.7), end=False)
    folder = write_run(tmp_path / "trial", record)
    whole = (folder / "record.jsonl").read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for end in (start + 1, start + 20, (start + len(whole)) // 2, len(whole) - 2):
        (folder / "record.jsonl").write_bytes(whole[:end])
        read = read_record(folder)
        assert read.rounds == record.rounds[:1]
        assert read.notes == (f"{folder / 'record.jsonl'} line 3 is cut off or damaged and was left out",)
    (folder / "record.jsonl").write_bytes(whole[:-1])  # only the line's end is missing
    assert read_record(folder).rounds == record.rounds


@pytest.mark.parametrize("content", [b"garbage", b"garbage\n", b"\x00\xff", b'{"phase": "ini'])
def test_a_record_of_garbage_alone_is_no_empty_run(tmp_path: Path, content: bytes) -> None:
    folder = write_run(tmp_path / "trial", run_record((0.6,)))
    (folder / "record.jsonl").write_bytes(content)
    with pytest.raises(RecordError, match=r"record\.jsonl line 1: is not JSON"):
        read_record(folder)


def test_a_writer_goes_on_after_a_cut_line(tmp_path: Path) -> None:
    record = run_record((0.6, 0.7, 0.8))
    folder = write_run(tmp_path / "trial", replace(record, rounds=record.rounds[:2], end=None))
    whole = (folder / "record.jsonl").read_bytes()
    (folder / "record.jsonl").write_bytes(whole[:-30])
    with RecordWriter(folder) as writer:
        for phase in (*record.rounds[1:], record.end):
            assert phase is not None
            writer.write(phase)
    assert read_record(folder) == replace(record, path=folder)


def test_a_rewritten_record_holds_the_given_lines_alone(tmp_path: Path) -> None:
    record = run_record((0.6, 0.7))
    folder = write_run(tmp_path / "trial", record)
    assert record.init is not None
    rewrite_record(folder, [record.init, record.rounds[0]])
    assert read_record(folder) == replace(record, rounds=record.rounds[:1], end=None, path=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "record.jsonl"]


def lines_of(*changed: tuple[int, str | None]) -> list[str]:
    """The lines of a good run, some replaced, doubled (a number's text is "again") or left out (None)."""
    record = run_record((0.6, 0.7))
    assert record.init is not None
    assert record.end is not None
    lines: list[str | None] = [to_json(phase) for phase in (record.init, *record.rounds, record.end)]
    for index, line in changed:
        lines[index] = f"{lines[index]}\n{lines[index]}" if line == "again" else line
    return [line for line in lines if line is not None]


@pytest.mark.parametrize(
    ("changed", "number", "problem"),
    [
        ((1, "{"), 2, "is not JSON"),
        ((0, "{"), 1, "is not JSON"),
        ((1, ""), 2, "is not JSON"),
        ((1, "[1]"), 2, "phase: None"),
        ((1, '{"phase": "rounds"}'), 2, "phase: 'rounds'"),
        ((1, '{"phase": ["round"]}'), 2, "phase: ['round']"),
        ((1, '{"phase": "round", "round": 1}'), 2, "round: "),
        ((1, to_json(round_record(1, 0.5)).replace('"bytes_up": 2000000', '"bytes_up": "many"')), 2, "bytes_up"),
        ((1, to_json(round_record(1, 0.5)).replace('"elapsed": 14.0', '"elapsed": NaN')), 2, "NaN"),
        ((1, None), 2, "round: 2 comes after 0, wanted 1"),
        ((1, "again"), 3, "round: 1 comes after 1, wanted 2"),
        ((0, "again"), 2, "init: comes twice"),
        ((3, "again"), 5, "comes after the end"),
    ],
)
def test_a_damaged_record_is_refused_naming_the_line(
    tmp_path: Path, changed: tuple[int, str | None], number: int, problem: str
) -> None:
    folder = write_run(tmp_path / "trial", run_record((0.6,)))
    (folder / "record.jsonl").write_text("\n".join(lines_of(changed)) + "\n")
    with pytest.raises(RecordError) as caught:
        read_record(folder)
    assert str(caught.value).startswith(f"{folder / 'record.jsonl'} line {number}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["config.toml", "record.jsonl"])
def test_a_folder_without_its_files_is_refused_by_name(tmp_path: Path, missing: str) -> None:
    folder = write_run(tmp_path / "trial", run_record((0.6,)))
    (folder / missing).unlink()
    with pytest.raises(RecordError, match=f"{missing}: no such file"):
        read_record(folder)


def test_no_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="nowhere: no such folder"):
        read_record(tmp_path / "nowhere")


def test_a_configuration_that_does_not_fit_is_refused_by_its_key(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "trial", run_record((0.6,)))
    (folder / "config.toml").write_text("[train]\nround = 3\n")
    with pytest.raises(ConfigError, match=r"config.toml: train.round is no known key; did you mean train.rounds"):
        read_record(folder)


def test_a_run_that_has_only_begun_reads_as_one_without_rounds(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "trial", replace(run_record((0.6,)), init=None, rounds=(), end=None))
    read = read_record(folder)
    assert (read.init, read.rounds, read.end, read.notes) == (None, (), None, ())


def test_a_new_folder_never_is_one_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "deep" / "runs"
    assert [new_run_dir("~/deep/runs", "demo") for _ in range(3)] == [out / n for n in ("demo", "demo-2", "demo-3")]
    (out / "other").write_text("a file of that name")
    assert new_run_dir(out, "other").name == "other-2"


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_run_dir(tmp_path, "demo"), range(24)))
    assert len(set(folders)) == 24
    assert all(folder.is_dir() for folder in folders)


def test_runs_that_differ_only_in_time_and_place_are_equal_without_timings() -> None:
    record = run_record((0.6, 0.7))
    assert record.init is not None
    assert record.end is not None
    later = replace(
        record,
        config=run_record((0.6, 0.7), "name=other", "out=elsewhere").config,
        init=replace(record.init, seconds={"load": 99.0}),
        rounds=tuple(replace(entry, seconds={"train": 1.0}, elapsed=1.0) for entry in record.rounds),
        end=replace(record.end, seconds={}),
        path=Path("elsewhere/other"),
        notes=("cut",),
    )
    assert later != record
    assert without_timings(later) == without_timings(record)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: replace(r, config=run_record((0.6, 0.7), "seed=43").config),
        lambda r: replace(r, init=replace(r.init, gal=[0, 1])),
        lambda r: replace(r, rounds=(r.rounds[0], replace(r.rounds[1], loss=0.1))),
        lambda r: replace(r, rounds=r.rounds[:1]),
        lambda r: replace(r, end=replace(r.end, global_accuracy=0.71)),
        lambda r: replace(r, end=None),
    ],
)
def test_runs_that_differ_in_a_result_differ_without_timings(change: Any) -> None:
    record = run_record((0.6, 0.7))
    assert without_timings(change(record)) != without_timings(record)


def test_runs_of_one_name_are_told_apart_by_their_folders() -> None:
    record = run_record((0.6,))
    same = [replace(record, path=Path(folder) / "demo") for folder in ("a", "b")]
    assert labels([*same, replace(record, path=Path("a/other"))]) == [str(Path("a/demo")), str(Path("b/demo")), "other"]
