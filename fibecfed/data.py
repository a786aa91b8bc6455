"""Text classification data: a training set, a test set, and the names of the classes.

What comes out is checked once: non-empty texts, labels 0 … C−1, and a sample of every class to train on. Every
refusal is one line that names the source and the column.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fibecfed.partition import apportion
from fibecfed.sources import Columns, DataError, Table, read_demo, read_hub, read_path

__all__ = ["DataError", "Split", "Task", "load_classes", "load_task", "merge_classes"]


@dataclass(frozen=True)
class Split:
    """n samples: texts, second texts (sentence pairs) or None, labels (n,) int64, natural owners or None; ``rows`` (n,)
    int64: where each stands in what was read, counted from 0."""

    text: list[str]
    pair: list[str] | None
    labels: NDArray[np.int64]
    keys: list[str] | None
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.text)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Split:
        """The samples at ``indices``, in the order of ``indices``."""
        chosen = np.asarray(indices, dtype=np.int64)

        def pick(values: list[str]) -> list[str]:
            return [values[index] for index in chosen]

        pair = None if self.pair is None else pick(self.pair)
        keys = None if self.keys is None else pick(self.keys)
        return Split(pick(self.text), pair, self.labels[chosen], keys, None if self.rows is None else self.rows[chosen])


@dataclass(frozen=True)
class Task:
    """A named training and test set; ``classes[c]`` is the name of label c."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]


def load_task(
    source: str | Path,
    *,
    text: str = "text",
    pair: str | None = None,
    label: str = "label",
    key: str | None = None,
    test: str | None = None,
    test_fraction: float | None = 0.2,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> Task:
    """Read a classification task.

    Labels may be int, bool or str. Ints 0 … C−1 stay what they are; other ints are numbered in ascending order, others
    in sorted order, and classes that the source declares (hub, Parquet) as declared. Without a test set, a stratified
    share of the training set becomes one.

    Args:
        source: ``"demo"`` (film reviews, fresh or rotten; key: the film), a .jsonl, .json, .csv, .tsv or .parquet file,
            a folder with train.* and test.*, or ``"hub:NAME[/CONFIG]"`` (``hub:glue/sst2``, ``hub:org/name/config``).
            In .csv and .tsv an empty cell is missing, and only that ("NA" is a text); .tsv knows no quoting.
        text: column of the text. Where there is no column ``text``, the usual sentence columns of benchmarks are known.
        pair: column of the second text; None takes ``text_pair`` where there is one.
        label: column of the label.
        key: column of the natural owner of a sample, for partitions by key.
        test: a file (for a file), or the name of the test split (for a folder or the hub).
        test_fraction: share that becomes the test set when there is none, between 0 and 1; None: then there is none.
        max_train: at most so many training samples, drawn class by class in proportion.
        max_test: at most so many test samples, drawn likewise.
        seed: of the test share and of the draws.
        classes: the names of the labels 0 … C−1, of which some may have no sample here: a device's own part of a task
            that others know more of. None: those that are found.

    Raises:
        DataError: the source cannot be read, a column is missing, a text is empty, a label is missing or unknown to the
            training set, a class has no training sample, or an argument is out of range.
    """
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise DataError(f"test_fraction: {test_fraction}, wanted a share between 0 and 1")
    name, train, held_out, columns = _read(source, Columns(text, pair, label, key), test)
    own = classes is not None
    if classes is None:
        classes = _classes(train, columns.label)
        if len(classes) < 2:
            raise DataError(
                f"{train.where}: label column {columns.label!r} has {len(classes)} class, wanted at least two"
            )
    classes = tuple(classes)
    training = _split(train, columns, classes)
    for missing in () if own else np.flatnonzero(np.bincount(training.labels, minlength=len(classes)) == 0):
        raise DataError(f"{train.where}: class {classes[missing]!r} of {columns.label!r} has no sample to train on")
    if held_out is not None:
        testing = _split(held_out, columns, classes)
    elif test_fraction is None:
        testing = training.take(np.arange(0))
    else:
        chosen = _test_share(training.labels, test_fraction, train.where, seed)
        testing, training = training.take(np.flatnonzero(chosen)), training.take(np.flatnonzero(~chosen))
    if max_train is not None:
        if max_train < (present := len(np.unique(training.labels))):
            raise DataError(f"max_train: {max_train}, wanted at least one sample for each of {present} classes")
        training = training.take(_stratified(training.labels, max_train, np.random.default_rng([seed, 1]), low=1))
    if max_test is not None:
        if max_test < 1:
            raise DataError(f"max_test: {max_test}, wanted at least 1")
        testing = testing.take(_stratified(testing.labels, max_test, np.random.default_rng([seed, 2])))
    return Task(name, training, testing, classes)


def load_classes(
    source: str | Path,
    *,
    text: str = "text",
    pair: str | None = None,
    label: str = "label",
    key: str | None = None,
    test: str | None = None,
) -> tuple[str, ...]:
    """The names of the classes that a source declares, or has to train or to test on, in the order of
    :func:`load_task`; also a single one. Raises DataError as :func:`load_task` does."""
    _, train, held_out, columns = _read(source, Columns(text, pair, label, key), test)
    found = _classes(train, columns.label)
    if held_out is None or train.declared_classes(columns.label):
        return found
    return _sorted({*found, *_label_names(held_out, columns.label)})


def merge_classes(found: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The classes of a task whose parts have these: in their common order where all agree, else sorted as
    :func:`load_task` sorts what it finds. Raises DataError where there are fewer than two."""
    every = [tuple(names) for names in found]
    merged = every[0] if len(set(every)) == 1 else _sorted({name for names in every for name in names})
    _check_spelling(merged, "the devices' data")
    if len(merged) < 2:
        raise DataError(f"the devices' data has {len(merged)} class in all, wanted at least two")
    return merged


def _read(source: str | Path, columns: Columns, test: str | None) -> tuple[str, Table, Table | None, Columns]:
    """Name, training table, test table where there is one, and the columns under their names there."""
    held_out = None
    if source == "demo":
        if test is not None:
            raise DataError(f"test: {test!r}, wanted None: the demo has no test set of its own")
        name, train = "demo", read_demo()
        columns = replace(columns, label="category", key=columns.key or "movie_name")
    elif isinstance(source, str) and source.startswith("hub:"):
        name, train, held_out = read_hub(source.removeprefix("hub:"), columns.label, test)
    else:
        name, train, held_out = read_path(Path(source).expanduser(), columns, test)
    return name, train, held_out, columns.found_in(train.names)


def _label_names(table: Table, column: str) -> list[str]:
    """Each sample's label by name: a declared class, a whole number as written by Python, or the text itself."""
    values, declared = table.column(column), table.declared_classes(column)
    for row, value in enumerate(values):
        known = isinstance(value, int | str) or (isinstance(value, float) and value.is_integer())
        if not known or value == "" or (declared is not None and value == -1):
            raise DataError(
                f"{table.where}: label column {column!r}, sample {row} is {value!r}, wanted an int or a str"
            )
    if declared is not None:
        return [declared[value] for value in values]
    # As text, for what a table says with "01", "1.0" or "True" is 1 or true in JSON; but only where all are alike.
    names = [str(value).lower() if isinstance(value, bool) else str(value) for value in values]
    if all(re.fullmatch(r"[+-]?\d+(\.0*)?", name) for name in names):
        return [str(int(name.partition(".")[0])) for name in names]
    if all(name.lower() in ("true", "false") for name in names):
        return [name.lower() for name in names]
    _check_spelling(names, f"{table.where}: label column {column!r}")
    return names


def _check_spelling(names: Iterable[str], where: str) -> None:
    """Refuse classes that differ in white space alone: a slip of the pen, of which a model would make two classes."""
    spelled: dict[str, str] = {}
    for name in sorted(set(names)):
        other = spelled.setdefault(" ".join(name.split()), name)
        if other != name:
            raise DataError(
                f"{where} has {other!r} and {name!r}, which differ in white space alone: wanted one of them"
            )


def _classes(table: Table, column: str) -> tuple[str, ...]:
    """The classes that a table declares, or those that it has, sorted."""
    found = set(_label_names(table, column))
    return tuple(table.declared_classes(column) or _sorted(found))


def _sorted(names: set[str]) -> tuple[str, ...]:
    numbers = all(re.fullmatch(r"-?\d+", name) for name in names)
    return tuple(sorted(names, key=int if numbers else None))


def _split(table: Table, columns: Columns, classes: Sequence[str]) -> Split:
    names = _label_names(table, columns.label)
    number = {name: index for index, name in enumerate(classes)}
    if unknown := sorted(set(names) - set(number)):
        raise DataError(
            f"{table.where}: label column {columns.label!r} has {', '.join(map(repr, unknown[:5]))}, "
            f"not a class of the training set ({', '.join(map(repr, classes[:20]))})"
        )
    labels = np.array([number[name] for name in names], dtype=np.int64)
    keys = None if columns.key is None else table.column(columns.key)
    for row, value in enumerate(keys or []):
        if value is None or value == "":
            raise DataError(f"{table.where}: key column {columns.key!r}, sample {row} is empty")
    return Split(
        text=table.texts(columns.text),
        pair=None if columns.pair is None else table.texts(columns.pair),
        labels=labels,
        keys=None if keys is None else [str(value) for value in keys],
        rows=np.arange(len(labels), dtype=np.int64),
    )


def _test_share(labels: NDArray[np.int64], fraction: float, where: str, seed: int) -> NDArray[np.bool_]:
    """Which samples become the test set: (n,) bool. Each class keeps at least one sample to train on."""
    count, classes = len(labels), len(np.unique(labels))
    if count <= classes:
        raise DataError(f"{where}: {count} samples of {classes} classes are too few to keep some as a test set")
    size = min(max(1, round(fraction * count)), count - classes)
    chosen = np.zeros(count, dtype=np.bool_)
    chosen[_stratified(labels, size, np.random.default_rng([seed, 0]), keep=1)] = True
    return chosen


def _stratified(
    labels: NDArray[np.int64], size: int, rng: np.random.Generator, *, low: int = 0, keep: int = 0
) -> NDArray[np.int64]:
    """Ascending indices of ``size`` samples, classes in proportion; at least ``low`` taken, ``keep`` left of each."""
    if size >= len(labels):
        return np.arange(len(labels), dtype=np.int64)
    counts = np.bincount(labels)
    quota = apportion(counts, size, low=np.minimum(counts, low), high=counts - np.minimum(counts, keep))
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:number] for label, number in enumerate(quota)]
    return np.sort(np.concatenate(drawn))
