"""Score files: what is scored, and that a file is written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from fibecfed import NotFiniteScoresError, score_samples
from fibecfed.batches import collate, encode, length_buckets
from fibecfed.cli import _samples_table
from fibecfed.config import ConfigError, RunConfig, load_config
from fibecfed.federation import load_base, load_data
from fibecfed.scores import score_data, write_scores

from .checkpoints import WORDS, checkpoint
from .tables import write

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
    with pytest.raises(ConfigError, match=r"missing.scores.csv: no such folder as .*missing"):
        write_scores(tmp_path / "missing" / "scores.csv", COLUMNS)
    assert not list(tmp_path.iterdir())


def config(folder: Path, *overrides: str) -> RunConfig:
    """A configuration of 20 samples of two named classes, of other lengths each, with a second text."""
    rng = np.random.default_rng(0)

    def words(most: int) -> str:
        return " ".join(WORDS[w] for w in rng.integers(0, 40, rng.integers(2, most)))

    rows = [{"text": words(20), "text_pair": words(6), "label": ("no", "yes")[i % 2]} for i in range(20)]
    paths = [
        f"data.source={write(folder / 'data.jsonl', rows)}",
        f"model.source={checkpoint(folder / 'model', 'bert')}",
    ]
    return load_config(None, [*paths, "device=cpu", "eval.batch_size=3", "data.max_tokens=16", "seed=4", *overrides])


def one_by_one(config: RunConfig) -> torch.Tensor:
    task = load_data(config, hold_out=False)
    loaded = load_base(config, 2)
    samples = encode(task.train, loaded.tokenizer, config.data.max_tokens)
    return score_samples(loaded.model, [collate(samples, [i]) for i in range(len(samples))]).scores


@pytest.mark.usefixtures("one_thread")
def test_every_training_sample_has_its_own_score_and_its_rank(tmp_path: Path) -> None:
    settings, told = config(tmp_path), []
    columns = score_data(settings, lambda done, total: told.append((done, total)))
    train = load_data(settings, hold_out=False).train
    assert list(columns) == ["index", "text", "pair", "label", "score", "rank"]
    everything = [json.loads(line)["text"] for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert [everything[index] for index in columns["index"]] == train.text  # rows of the file, not of what is scored
    assert columns["index"] == list(range(20))
    assert columns["text"] == train.text
    assert columns["pair"] == train.pair
    assert columns["label"] == [("no", "yes")[label] for label in train.labels]
    assert columns["score"] == pytest.approx(one_by_one(settings).tolist(), rel=1e-4)
    assert len(set(columns["score"])) == 20
    assert [columns["rank"].index(rank) for rank in range(20)] == np.argsort(columns["score"]).tolist()
    assert told == [(done, 20) for done in (3, 6, 9, 12, 15, 18, 20)]


def test_where_there_is_a_test_set_the_training_set_alone_is_scored(tmp_path: Path) -> None:
    own = write(tmp_path / "test.jsonl", [{"text": "w1", "text_pair": "w2", "label": label} for label in ("no", "yes")])
    columns = score_data(config(tmp_path, f"data.test={own}", "data.max_train=8"))
    assert len(columns["score"]) == 8
    assert not {"w1"} & set(columns["text"])


def test_scores_that_are_not_finite_are_refused_by_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)

    def broken(*_: Any, **__: Any) -> Any:
        raise NotFiniteScoresError("loader", "sample", [0, 7])

    monkeypatch.setattr("fibecfed.scoring.score_samples", broken)
    with pytest.raises(NotFiniteScoresError, match=r"data\.jsonl: the score of row \d+, \d+ is not finite") as found:
        score_data(settings)
    task = load_data(settings, hold_out=False)
    lengths = encode(task.train, load_base(settings, 2).tokenizer, 16).lengths
    assert sorted(found.value.samples) == sorted(np.argsort(-lengths, kind="stable")[[0, 7]].tolist())


@pytest.mark.usefixtures("one_thread")
def test_the_models_own_labels_and_autocast_are_as_the_configuration_says(tmp_path: Path) -> None:
    plain = score_data(config(tmp_path))["score"]
    settings = config(tmp_path, "curriculum.labels=model")
    loaded, split = load_base(settings, 2), load_data(settings, hold_out=False).train
    samples = encode(split, loaded.tokenizer, 16)
    buckets = length_buckets(samples, 3)
    own = score_samples(
        loaded.model,
        [collate(samples, bucket) for bucket in buckets.batches],
        labels="model",
        generator=torch.Generator().manual_seed(4),
    )
    drawn = score_data(settings)["score"]
    assert drawn == own.scores[torch.from_numpy(buckets.inverse)].tolist()
    assert drawn != plain
    rounded = score_data(config(tmp_path, "autocast=true"))["score"]
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.2)


def test_a_text_that_looks_like_markup_is_shown_as_it_is() -> None:
    columns = {"score": [1.0], "label": ["[b]"], "text": ["[i]so[/i] [/quote]"]}
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(_samples_table("easiest", columns, [0]))
    shown = console.export_text()
    assert "[b]" in shown
    assert "[i]so[/i] [/quote]" in shown
