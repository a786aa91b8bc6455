"""What a run stands on is what its configuration says: every key reaches the room that it is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fibecfed.batches import encode
from fibecfed.config import RunConfig, load_config
from fibecfed.data import load_task
from fibecfed.federation import build, load_base, load_data, pick_device
from fibecfed.models import load_model
from fibecfed.partition import partition, split_like

from .checkpoints import WORDS, checkpoint
from .federated import federation
from .tables import same, write

COLUMNS = ["data.text=first", "data.pair=second", "data.label=kind", "data.key=owner"]
SPLITS = ["partition.devices=3", "partition.alpha=0.4", "partition.size_alpha=0.3", "partition.min_size=11"]
pytestmark = pytest.mark.usefixtures("one_thread")


def table(size: int, seed: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)

    def words() -> str:
        return " ".join(WORDS[w] for w in rng.integers(0, 40, rng.integers(4, 12)))

    return [
        {"first": words(), "second": words(), "kind": str(rng.integers(3)), "owner": str(rng.integers(9))}
        for _ in range(size)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    write(path / "data.jsonl", table(90, 1))
    write(path / "other.jsonl", table(30, 2))
    checkpoint(path / "model", "bert")
    return path


def config(folder: Path, *overrides: str) -> RunConfig:
    paths = [f"data.source={folder / 'data.jsonl'}", f"model.source={folder / 'model'}"]
    return load_config(None, [*paths, "seed=11", "device=cpu", *COLUMNS, *overrides])


def test_the_data_is_what_its_keys_say(folder: Path) -> None:
    names = {"text": "first", "pair": "second", "label": "kind", "key": "owner"}
    task = load_data(config(folder, "data.test_fraction=0.4", "data.max_train=30", "data.max_test=20"))
    wanted = load_task(folder / "data.jsonl", **names, test_fraction=0.4, max_train=30, max_test=20, seed=11)
    assert same(task, wanted)
    assert task.train.pair is not None
    assert task.train.keys is not None
    assert (len(task.train), len(task.test)) == (30, 20)
    assert len(load_data(config(folder, "data.test_fraction=0.4")).test) == pytest.approx(36, abs=2)
    other = load_data(config(folder, f"data.test={folder / 'other.jsonl'}"))
    assert other.test.text == [row["first"] for row in table(30, 2)]


def test_the_model_is_what_its_keys_say(folder: Path) -> None:
    keys = ["rank=3", "alpha=5.0", "dropout=0.25", "rslora=true", 'targets=["key"]', "dtype=bfloat16", "attn=eager"]
    loaded = load_base(config(folder, *(f"model.{key}" for key in keys)), 4)
    lora, model = loaded.model.peft_config["default"], loaded.model
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora) == (3, 5.0, 0.25, True)
    assert loaded.targets == ("key",)
    assert model.base_model.model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.config.num_labels == 4


def test_the_model_starts_by_the_seed(folder: Path) -> None:
    found = load_base(config(folder), 3).model.state_dict()
    wanted = load_model(folder / "model", num_classes=3, seed=11).model.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("scheme", ["label", "iid", "key"])
def test_the_devices_are_what_the_partitions_keys_say(folder: Path, scheme: str) -> None:
    fed = build(config(folder, f"partition.scheme={scheme}", "train.per_round=2", "data.max_tokens=9", *SPLITS))
    train, test = fed.task.train, fed.task.test
    options = {"alpha": 0.4, "size_alpha": 0.3, "min_size": 11, "seed": 11}
    parts = partition(train.labels, devices=3, scheme=scheme, keys=train.keys, **options)  # type: ignore[arg-type]
    keys = {"train_keys": train.keys, "test_keys": test.keys} if scheme == "key" else {}
    tests = split_like(train.labels, parts, test.labels, seed=11, **keys)
    for device, part, own in zip(fed.devices, parts, tests, strict=True):
        assert device.train.tolist() == part.tolist()
        assert device.test.tolist() == own.tolist()
    assert [device.index for device in fed.devices] == [0, 1, 2]
    assert fed.sizes.tolist() == [len(part) for part in parts]
    for encoded, split in ((fed.train, train), (fed.test, test)):
        assert encoded.tokens.tolist() == encode(split, fed.loaded.tokenizer, 9).tokens.tolist()
        assert encoded.lengths.max() == 9
    assert fed.loaded.model.config.num_labels == 3


def test_majorities_are_named_by_the_training_data_and_measured_on_the_test_data() -> None:
    fed = federation()
    device = fed.devices[1]
    fed.task.train.labels[:] = 0
    fed.task.train.labels[device.train] = 1
    fed.task.test.labels[:] = 2
    fed.task.test.labels[device.test] = [0, 1, 1, 2, 2, 2]
    assert fed.majority == 1 / 13
    assert fed.own_majority(device) == 2 / 6
    assert fed.own_majority(fed.devices[0]) == 0.0


@pytest.mark.parametrize(("there", "wanted"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one(there: bool, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert pick_device("auto") == torch.device(wanted)
    assert pick_device("cpu") == torch.device("cpu")
