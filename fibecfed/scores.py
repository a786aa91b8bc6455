"""Fisher scores of a data set's training samples as a file: how hard each sample is for a model."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .config import ConfigError, RunConfig
from .files import whole_file

FORMATS = (".parquet", ".csv")


def score_data(config: RunConfig, on_batch: Callable[[int, int], None] | None = None) -> dict[str, list[Any]]:
    """Score the samples of ``config.data`` with ``config.model`` before any training: those of the training set, or all
    where the source has no test set of its own.

    Returns columns, a row a sample in the order of the data: index (the sample's row in the source, from 0; samples
    beyond ``data.max_train`` are not scored), text, pair (where there is one), label (its
    name), score = Σ_p (∂ log p(y | x) / ∂p)² over the LoRA parameters, rank (0: the easiest). ``on_batch(done, total)``
    tells how far it is.

    Raises DataError and ModelError for what does not fit, NotFiniteScoresError, naming rows of the source.
    """
    import torch

    from .batches import collate, encode, length_buckets
    from .federation import load_base, load_data
    from .scoring import NotFiniteScoresError, score_samples

    data = config.data
    task = load_data(config, hold_out=False)
    loaded = load_base(config, len(task.classes))
    device = loaded.model.device
    samples = encode(task.train, loaded.tokenizer, data.max_tokens)
    buckets = length_buckets(samples, config.eval.batch_size)
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        if on_batch is not None:
            on_batch(done, len(samples))

    assert task.train.rows is not None
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            found = score_samples(
                loaded.model,
                ({key: value.to(device) for key, value in collate(samples, part).items()} for part in buckets.batches),
                labels=config.curriculum.labels,
                generator=torch.Generator().manual_seed(config.seed),
                on_batch=count,
            )
    except NotFiniteScoresError as error:
        rows = task.train.rows[np.concatenate(buckets.batches)[error.samples]]
        raise NotFiniteScoresError(data.source, "row", sorted(rows.tolist())) from None
    scores = found.scores.cpu().numpy()[buckets.inverse]
    rank = np.empty(len(scores), dtype=np.int64)
    rank[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    columns: dict[str, list[Any]] = {"index": task.train.rows.tolist(), "text": list(task.train.text)}
    if task.train.pair is not None:
        columns["pair"] = list(task.train.pair)
    columns["label"] = [task.classes[label] for label in task.train.labels]
    return {**columns, "score": scores.tolist(), "rank": rank.tolist()}


def check_format(path: Path) -> None:
    """Refuse, before any work, a file that :func:`write_scores` could not write. Raises ConfigError."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: wanted a file that ends in {' or '.join(FORMATS)}")
    if path.is_dir():
        raise ConfigError(f"{path}: a folder, wanted a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: no such folder as {path.parent}")


def write_scores(path: Path, columns: Mapping[str, list[Any]]) -> None:
    """Write columns of equal length to a .parquet or .csv file, whole or not at all."""
    check_format(path)
    with whole_file(path) as partial:
        if path.suffix == ".parquet":
            from datasets import Dataset, disable_progress_bars

            disable_progress_bars()
            Dataset.from_dict(dict(columns)).to_parquet(partial)
        else:
            with partial.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
