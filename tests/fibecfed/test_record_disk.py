"""A record's lines on the disk: whole, and each as soon as it is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from fibecfed.record import RECORD_FILE, RecordWriter, read_record

from .handmade import round_record, run_record, write_run


def test_a_round_is_on_the_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    record = run_record((0.6, 0.7), end=False)
    folder = write_run(tmp_path / "trial", replace(record, rounds=()))
    with RecordWriter(folder) as writer:
        for number, entry in enumerate(record.rounds, start=1):
            writer.write(entry)
            assert read_record(folder).rounds == record.rounds[:number]
    assert read_record(folder).end is None


def test_a_line_that_the_disk_takes_in_parts_is_whole(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        file = writer._file
        few = SimpleNamespace(write=lambda line: file.write(line[:7]), fileno=file.fileno, close=file.close)
        writer._file = few  # type: ignore[assignment]
        for number in (1, 2):
            writer.write(round_record(number, 0.5))
    lines = (tmp_path / RECORD_FILE).read_bytes().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]
