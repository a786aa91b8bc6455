"""Small labelled tables, written in every format that data is read from."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from fibecfed.data import Task

Row = dict[str, Any]


def rows(count: int = 30, classes: Sequence[Any] = (0, 1, 2)) -> list[Row]:
    return [
        {"text": f'sample {index}, "quoted"', "label": classes[index % len(classes)], "who": f"author {index % 4}"}
        for index in range(count)
    ]


def write(path: Path, samples: list[Row]) -> Path:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(samples).to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if path.suffix == ".tsv" else {}
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(samples[0]), **options)
            writer.writeheader()
            writer.writerows(samples)
    else:
        text = json.dumps(samples) if path.suffix == ".json" else "\n".join(map(json.dumps, samples))
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def same(left: Task, right: Task) -> bool:
    return left.classes == right.classes and all(
        a.text == b.text and a.pair == b.pair and a.keys == b.keys and np.array_equal(a.labels, b.labels)
        for a, b in ((left.train, right.train), (left.test, right.test))
    )
