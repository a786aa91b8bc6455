"""Everything a run stands on, built from a configuration: data, partition, model, buffer, devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .adapter import FlatAdapter
from .batches import Encoded, encode, no_samples
from .client import Device
from .config import ConfigError, RunConfig
from .data import Split, Task, load_classes, load_task
from .models import LoadedModel, load_model
from .partition import partition, split_like


@dataclass
class Federation:
    """The task, the one model of the process with its flat buffer, the encoded samples, and the devices."""

    config: RunConfig
    task: Task
    loaded: LoadedModel
    flat: FlatAdapter
    train: Encoded
    test: Encoded
    devices: list[Device]

    @property
    def sizes(self) -> np.ndarray:
        """n_k of every device."""
        return np.array([device.size for device in self.devices])

    @property
    def majority(self) -> float:
        """Accuracy on the test set of always answering the training set's most frequent class."""
        most = np.bincount(self.task.train.labels).argmax()
        return float((self.task.test.labels == most).mean())

    def own_majority(self, device: Device) -> float:
        """Accuracy on the device's own test samples of always answering the most frequent class of its training
        data."""
        most = np.bincount(self.task.train.labels[device.train]).argmax()
        return float((self.task.test.labels[device.test] == most).mean())


def load_data(config: RunConfig, classes: Sequence[str] | None = None, *, hold_out: bool = True) -> Task:
    """The data of a configuration; ``classes``: those of all devices, where it is one's own. ``hold_out``: make a test
    set of the training set where there is none. Raises DataError for what does not fit."""
    data = config.data
    return load_task(
        data.source,
        **_columns(config),
        test=data.test,
        test_fraction=data.test_fraction if hold_out else None,
        max_train=data.max_train,
        max_test=data.max_test,
        seed=config.seed,
        classes=classes,
    )


def own_classes(config: RunConfig) -> tuple[str, ...]:
    """The classes of a device's own data. Raises DataError for what does not fit."""
    return load_classes(config.data.source, **_columns(config), test=config.data.test)


def _columns(config: RunConfig) -> dict[str, str]:
    data = config.data
    columns = {"text": data.text, "pair": data.pair, "label": data.label, "key": data.key}
    return {column: name for column, name in columns.items() if name is not None}


def load_base(config: RunConfig, num_classes: int) -> LoadedModel:
    """The model of a configuration with a fresh adapter, on its device. Raises ModelError for what does not fit."""
    model = config.model
    loaded = load_model(
        model.source,
        num_classes=num_classes,
        rank=model.rank,
        alpha=model.alpha,
        dropout=model.dropout,
        rslora=model.rslora,
        targets=model.targets,
        dtype=model.dtype,
        attn=model.attn,
        seed=config.seed,
    )
    loaded.model.to(pick_device(config.device))
    return loaded


def build(config: RunConfig) -> Federation:
    """Load data and model, divide the data over the devices. Raises the rooms' own errors for what does not fit."""
    task, split = load_data(config), config.partition
    parts = partition(
        task.train.labels,
        devices=split.devices,
        scheme=split.scheme,
        keys=task.train.keys,
        alpha=split.alpha,
        size_alpha=split.size_alpha,
        min_size=split.min_size,
        seed=config.seed,
    )
    keys = (task.train.keys, task.test.keys) if split.scheme == "key" else (None, None)
    tests = split_like(
        task.train.labels, parts, task.test.labels, seed=config.seed, train_keys=keys[0], test_keys=keys[1]
    )
    return assemble(config, task, [Device(k, *own) for k, own in enumerate(zip(parts, tests, strict=True))])


def build_own(config: RunConfig, classes: Sequence[str], index: int) -> Federation:
    """What device ``index`` has of a federation whose devices have data of their own: all of its data is its own."""
    task = load_data(config, classes)
    return assemble(config, task, [Device(index, np.arange(len(task.train)), np.arange(len(task.test)))])


def build_without_data(config: RunConfig, classes: Sequence[str]) -> Federation:
    """What the server has of such a federation: the model. Its devices are not here, nor a sample."""
    nothing = Split([], None, np.zeros(0, dtype=np.int64), None)
    return assemble(config, Task("", nothing, nothing, tuple(classes)), [])


def assemble(config: RunConfig, task: Task, devices: list[Device]) -> Federation:
    """The federation of these devices, with the configuration's model around the task."""
    loaded = load_base(config, len(task.classes))
    flat = FlatAdapter(loaded.model)
    if config.gal.count is not None and config.gal.count > len(flat.layers):
        raise ConfigError(f"gal.count = {config.gal.count}: wanted at most {len(flat.layers)}, the model's layers")

    def encoded(split: Split) -> Encoded:
        return encode(split, loaded.tokenizer, config.data.max_tokens) if len(split) else no_samples(loaded.tokenizer)

    return Federation(config, task, loaded, flat, encoded(task.train), encoded(task.test), devices)


def pick_device(name: str) -> torch.device:
    """The torch device of a name; "auto": CUDA if there is one, else the CPU. Raises ConfigError for one not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch has no one error for it
        raise ConfigError(f"device = {name!r}: not to be had here ({str(error).splitlines()[0]})") from None
    return device
