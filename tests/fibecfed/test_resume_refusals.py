"""What an interrupted run does not go on with: a cut record, another configuration, other data, another checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from fibecfed.checkpoint import CHECKPOINT_FILE
from fibecfed.phases import RoundRecord
from fibecfed.record import RecordError, SilentObserver, read_record, without_timings
from fibecfed.simulation import resume, run

from .small_run import config

pytestmark = pytest.mark.usefixtures("one_thread")
Sources = tuple[Path, Path]


class Stops(SilentObserver):
    def on_round(self, record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt


@pytest.fixture
def stopped(sources: Sources, tmp_path: Path) -> Path:
    """A run with its checkpoint of round 2."""
    with pytest.raises(KeyboardInterrupt):
        run(config(sources, tmp_path), observer=Stops())
    return tmp_path / "test"


def rewritten(folder: Path, **values: str) -> None:
    with safe_open(folder / CHECKPOINT_FILE, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, folder / CHECKPOINT_FILE, metadata={**metadata, **values})


def test_a_record_that_lost_lines_is_refused_and_left_as_it_is(stopped: Path) -> None:
    record = stopped / "record.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:-1]) + lines[-1][:-40])
    with pytest.raises(RecordError, match="its record has 1 rounds, its checkpoint is of round 2: lines of the record"):
        resume(stopped)
    record.write_text("".join(lines))
    assert len(resume(stopped).rounds) == 3


@pytest.mark.parametrize(
    ("line", "other", "words"),
    [
        ("rounds = 3", "rounds = 4", r"train\.rounds is 4, wanted 3 as when the run was interrupted"),
        ("rounds = 3", "", r"train\.rounds is \d+, wanted 3"),
        ("fraction = 0.34", "fraction = 1.0", r"gal\.fraction is 1\.0, wanted 0\.34"),
    ],
)
def test_another_configuration_is_refused_by_its_key(stopped: Path, line: str, other: str, words: str) -> None:
    file = stopped / "config.toml"
    text = file.read_text()
    assert line in text
    file.write_text(text.replace(line, other))
    with pytest.raises(RecordError, match=rf"config\.toml: {words}"):
        resume(stopped)


def test_a_folder_that_was_moved_and_renamed_goes_on_to_the_same_result(
    sources: Sources, stopped: Path, tmp_path: Path
) -> None:
    wanted = run(config(sources, tmp_path / "whole"))
    moved = stopped.rename(tmp_path / "moved")
    file = moved / "config.toml"
    file.write_text(file.read_text().replace('name = "test"', 'name = "moved"'))
    assert without_timings(resume(moved)) == without_timings(wanted)


def test_other_data_and_another_model_are_refused_by_what_they_are(stopped: Path) -> None:
    with safe_open(stopped / CHECKPOINT_FILE, "pt") as file:
        alike = json.loads(file.metadata()["alike"])
    assert alike.keys() == {"base weights", "tokenizer", "data"}
    for what in alike:
        rewritten(stopped, alike=json.dumps({**alike, what: "0" * 64}))
        with pytest.raises(RecordError, match=f"other {what} than when the run was interrupted"):
            resume(stopped)
    assert len(read_record(stopped).rounds) == 2


def test_a_checkpoint_that_says_nothing_of_its_run_is_refused(stopped: Path) -> None:
    for alike in ("[", "[1]"):
        rewritten(stopped, alike=alike)
        with pytest.raises(RecordError, match="not a checkpoint of this version of fibecfed"):
            resume(stopped)
