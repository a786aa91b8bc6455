"""Data: every kind of source gives the same task, and what cannot be used is refused in one line that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from fibecfed.data import DataError, Split, load_classes, load_task, merge_classes

from .tables import Row, rows, same, write


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz"])
def test_every_kind_of_file_gives_the_same_task(tmp_path: Path, suffix: str) -> None:
    task = load_task(write(tmp_path / f"reviews.{suffix}", rows()), key="who")
    expected = load_task(write(tmp_path / "expected.jsonl", rows()), key="who")
    assert same(task, expected)
    assert task.name == "reviews"
    assert task.classes == ("0", "1", "2")
    assert sorted(task.train.text + task.test.text) == sorted(row["text"] for row in rows())
    for part in (task.train, task.test):
        for text, label, key in zip(part.text, part.labels, part.keys or [], strict=True):
            index = int(text.split()[1].rstrip(","))
            assert (label, key) == (index % 3, f"author {index % 4}")


def test_a_folder_holds_train_and_test(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(9))
    write(tmp_path / "test.csv", rows(6))
    write(tmp_path / "validation.parquet", rows(3))
    task = load_task(tmp_path)
    assert (len(task.train), len(task.test), task.name) == (9, 6, tmp_path.name)
    assert task.train.text == [row["text"] for row in rows(9)]
    assert len(load_task(tmp_path, test="validation").test) == 3
    assert len(load_task(tmp_path / "train.jsonl", test=str(tmp_path / "validation.parquet")).test) == 3
    (tmp_path / "test.csv").unlink()
    assert len(load_task(tmp_path, test_fraction=1 / 3).test) == 3
    write(tmp_path / "train.csv", rows(9))
    with pytest.raises(DataError, match=r"wanted one file train\.\*.*; there is train\.csv, train\.jsonl"):
        load_task(tmp_path)


@pytest.mark.parametrize(
    ("found", "classes"),
    [
        ([1, 0, 2], ("0", "1", "2")),
        ([30, -1, 7], ("-1", "7", "30")),
        (["10", "9", "2"], ("2", "9", "10")),
        (["spam", "ham", "10"], ("10", "ham", "spam")),
        ([1.0, 0.0, 2.0], ("0", "1", "2")),
    ],
)
def test_labels_are_numbered_by_class(tmp_path: Path, found: list[Any], classes: tuple[str, ...]) -> None:
    task = load_task(write(tmp_path / "a.jsonl", rows(12, found)), test_fraction=0.25)
    assert task.classes == classes
    names = {str(int(value)) if not isinstance(value, str) else value for value in found}
    assert names == set(classes)
    for text, label in zip(task.train.text, task.train.labels, strict=True):
        value = found[int(text.split()[1].rstrip(",")) % len(found)]
        assert classes[label] == (value if isinstance(value, str) else str(int(value)))


@pytest.mark.parametrize(
    ("found", "classes"),
    [([True, False], ("false", "true")), ([2.0, 10.0], ("2", "10")), ([1, 0], ("0", "1"))],
)
def test_json_and_tables_name_a_class_alike(tmp_path: Path, found: list[Any], classes: tuple[str, ...]) -> None:
    """Devices have their own files: what one writes as true, another has as the text True."""
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert load_task(write(tmp_path / name, rows(12, found))).classes == classes
    as_text = [str(value) for value in found]
    assert load_task(write(tmp_path / "text.jsonl", rows(12, as_text))).classes == classes


def test_declared_classes_keep_their_order(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    samples = {"text": [f"t{index}" for index in range(8)], "label": [1, 0] * 4}
    datasets.Dataset.from_dict(samples, features=features).to_parquet(tmp_path / "train.parquet")
    write(tmp_path / "test.jsonl", [{"text": "t", "label": "neg"}])
    task = load_task(tmp_path)
    assert task.classes == ("pos", "neg")
    assert task.train.labels.tolist() == [1, 0] * 4
    assert task.test.labels.tolist() == [1]
    features["label"] = datasets.ClassLabel(names=["pos", "neg", "neutral"])
    datasets.Dataset.from_dict(samples, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet: class 'neutral' of 'label' has no sample to train on"):
        load_task(tmp_path)


def test_pairs_are_found_or_named(tmp_path: Path) -> None:
    samples = [row | {"text_pair": f"pair {index}", "other": f"other {index}"} for index, row in enumerate(rows(12))]
    path = write(tmp_path / "a.jsonl", samples)
    task, named = load_task(path), load_task(path, pair="other")
    for text, pair, other in zip(task.train.text, task.train.pair or [], named.train.pair or [], strict=True):
        index = text.split()[1].rstrip(",")
        assert (pair, other) == (f"pair {index}", f"other {index}")
    glue = [{"sentence2": "b", "sentence1": "a", "label": index % 2} for index in range(6)]
    assert load_task(write(tmp_path / "b.csv", glue)).train.pair == ["b"] * 5


def test_the_test_share_is_stratified_and_seeded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(100, ["a"] * 7 + ["b"] * 2 + ["c"]))
    task = load_task(path, test_fraction=0.3, seed=1)
    assert np.bincount(task.test.labels).tolist() == [21, 6, 3]
    assert np.bincount(task.train.labels).tolist() == [49, 14, 7]
    assert not set(task.train.text) & set(task.test.text)
    assert same(task, load_task(path, test_fraction=0.3, seed=1))
    assert not same(task, load_task(path, test_fraction=0.3, seed=2))
    small = load_task(path, max_train=20, max_test=10, test_fraction=0.3, seed=1)
    assert np.bincount(small.train.labels).tolist() == [14, 4, 2]
    assert np.bincount(small.test.labels).tolist() == [7, 2, 1]
    assert set(small.train.text) < set(task.train.text)
    assert set(small.test.text) < set(task.test.text)
    assert np.bincount(load_task(path, max_train=3).train.labels).tolist() == [1, 1, 1]
    assert len(load_task(path, max_train=10**6).train) == 80


def test_a_class_with_one_sample_stays_in_the_training_set(tmp_path: Path) -> None:
    samples = [*rows(10, ["a", "b"]), {"text": "rare", "label": "c", "who": "x"}]
    task = load_task(write(tmp_path / "a.jsonl", samples), test_fraction=0.9)
    assert np.bincount(task.train.labels).tolist() == [1, 1, 1]
    assert len(task.test) == 8


def test_split_takes_samples_in_the_order_asked() -> None:
    split = Split(["a", "b", "c"], ["A", "B", "C"], np.array([0, 1, 2]), ["x", "y", "z"])
    taken = split.take([2, 0, 2])
    assert (taken.text, taken.pair, taken.keys) == (["c", "a", "c"], ["C", "A", "C"], ["z", "x", "z"])
    assert taken.labels.tolist() == [2, 0, 2]
    assert len(taken) == 3


def bad(change: Row, at: int = 4) -> list[Row]:
    return [row | change if index == at else row for index, row in enumerate(rows(9))]


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (rows(9), {"label": "class"}, r"a\.jsonl: no column 'class'; there are text, label, who"),
        (rows(9), {"text": "body"}, r"a\.jsonl: no column 'body'; there are text, label, who"),
        (rows(9), {"pair": "second"}, "no column 'second'"),
        (rows(9), {"key": "owner"}, "no column 'owner'"),
        (bad({"text": " \n"}), {}, r"a\.jsonl: column 'text', sample 4 is ' \\n', wanted non-empty text"),
        (bad({"text": None}), {}, "column 'text', sample 4 is None"),
        ([row | {"text": 7} for row in rows(9)], {}, "column 'text', sample 0 is 7"),
        (bad({"label": None}), {}, "label column 'label', sample 4 is None, wanted an int or a str"),
        (bad({"label": 0.5}), {}, r"label column 'label', sample 4 is 0\.5"),
        ([row | {"label": [1]} for row in rows(9)], {}, r"label column 'label', sample 0 is \[1\]"),
        (bad({"who": None}), {"key": "who"}, "key column 'who', sample 4 is empty"),
        (rows(9, ["a b", "a  b "]), {}, r"'label' has 'a  b ' and 'a b', which differ in white space alone"),
        (rows(9, ["same"]), {}, "label column 'label' has 1 class, wanted at least two"),
        (rows(3), {}, "3 samples of 3 classes are too few"),
        (rows(9), {"max_train": 2}, "max_train: 2, wanted at least one sample for each of 3 classes"),
        (rows(9), {"max_test": 0}, "max_test: 0"),
        (rows(9), {"test_fraction": 1.0}, r"test_fraction: 1\.0"),
        (rows(9), {"test": "nowhere.jsonl"}, r"nowhere\.jsonl: no such file"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, samples: list[Row], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        load_task(write(tmp_path / "a.jsonl", samples), **options)
    assert "\n" not in str(refusal.value)


def test_labels_only_the_test_set_has_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(9, ["a", "b"]))
    write(tmp_path / "test.jsonl", rows(4, ["a", "x"]))
    with pytest.raises(DataError, match=r"test\.jsonl: label column 'label' has 'x', not a class of the training set"):
        load_task(tmp_path)
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        load_task(tmp_path / "nowhere")


def test_a_device_may_lack_classes_that_others_have(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", rows(8, ["b"]))
    with pytest.raises(DataError, match="has 1 class, wanted at least two"):
        load_task(path)
    assert load_classes(path) == ("b",)
    assert load_classes(path, test=str(write(tmp_path / "test.jsonl", rows(4, ["a", "b"])))) == ("a", "b")
    task = load_task(path, classes=("a", "b", "c"))
    assert task.classes == ("a", "b", "c")
    assert set(task.train.labels) == set(task.test.labels) == {1}
    for others in ((), tuple("acdefg"), tuple("acdefghijkl")):  # its split is the same whoever else there is
        assert len(load_task(path, classes=(*others, "b"), max_train=5, test_fraction=0.3).test) == 2
    with pytest.raises(DataError, match="has 'b', not a class"):
        load_task(path, classes=("a", "c"))


def test_classes_of_several_devices_are_sorted_unless_all_agree(tmp_path: Path) -> None:
    assert merge_classes([("b",), ("a", "c"), ("b",)]) == ("a", "b", "c")
    assert merge_classes([("10", "9"), ("2",)]) == ("2", "9", "10")
    declared = datasets.Dataset.from_dict(
        {"text": ["x", "y"] * 4, "label": [0, 1] * 4},
        features=datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])}
        ),
    )
    declared.to_parquet(tmp_path / "declared.parquet")
    assert load_classes(tmp_path / "declared.parquet") == ("pos", "neg")
    assert merge_classes([("pos", "neg")] * 3) == ("pos", "neg")
    assert load_task(tmp_path / "declared.parquet").classes == ("pos", "neg")
    with pytest.raises(DataError, match="1 class in all"):
        merge_classes([("a",), ("a",)])
    with pytest.raises(DataError, match=r"the devices' data has 'a' and 'a ', which differ in white space alone"):
        merge_classes([("a", "b"), ("a ", "b")])
