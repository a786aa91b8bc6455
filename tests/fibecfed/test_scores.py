"""Score files: what is scored, and that a file is written whole or not at all."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fibecfed.config import ConfigError
from fibecfed.scores import write_scores

COLUMNS = {
    "index": [0, 1],
    "text": ['a "quoted", text', "ü\nnew line"],
    "label": ["0", "1"],
    "score": [0.5, 0.25],
    "rank": [1, 0],
}


@pytest.mark.parametrize("name", ["scores.csv", "scores.parquet"])
def test_written_scores_read_back(tmp_path: Path, name: str) -> None:
    write_scores(tmp_path / name, COLUMNS)
    if name.endswith(".csv"):
        with (tmp_path / name).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        read = {key: [type(COLUMNS[key][0])(row[key]) for row in rows] for key in COLUMNS}
    else:
        from datasets import Dataset

        read = Dataset.from_parquet(str(tmp_path / name), cache_dir=str(tmp_path / "cache")).to_dict()
    assert read == COLUMNS


@pytest.mark.parametrize("name", ["scores.csv", "scores.parquet"])
def test_scores_are_written_whole_or_not_at_all(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("of before")
    with pytest.raises(Exception, match=r"length|shorter"):
        write_scores(tmp_path / name, {**COLUMNS, "rank": [0]})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "of before"


def test_scores_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scores.json: wanted a file that ends in .parquet or .csv"):
        write_scores(tmp_path / "scores.json", COLUMNS)
