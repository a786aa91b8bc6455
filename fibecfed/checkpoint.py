"""A run's state after a round as one safetensors file, so that an interrupted run goes on where it stopped.

Random choices are named by what they are for (see :mod:`fibecfed.seeds`), so there is no generator state to keep.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .client import Device
from .config import RunConfig, dump_config, flat_settings
from .files import whole_file
from .record import RecordError
from .server import LocalStore, Server

CHECKPOINT_FILE = "checkpoint.safetensors"
MAY_CHANGE = ("name", "out", "device")  # settings, between an interruption and the run's going on


def save_checkpoint(
    run_dir: Path,
    round_: int,
    elapsed: float,
    server: Server,
    store: LocalStore,
    devices: list[Device],
    kept: Mapping[str, str],
) -> None:
    """Write the state after ``round_``, with ``kept`` beside it for :func:`kept_of`; an interruption meanwhile leaves
    the one before."""
    tensors = {"global": server.values.cpu(), "local": store.rows.cpu(), "residuals": store.residuals.cpu()}
    tensors["participations"] = torch.tensor([device.rounds for device in devices])
    for device in devices:
        if device.scores is not None:
            tensors[f"scores.{device.index}"] = torch.from_numpy(device.scores)
        if device.importance is not None:
            tensors[f"importance.{device.index}"] = device.importance
    with whole_file(run_dir / CHECKPOINT_FILE) as path:
        save_file(tensors, path, metadata={"round": str(round_), "elapsed": repr(elapsed), **kept})


def checkpoint_of(run_dir: Path) -> Path:
    """The file that :func:`save_checkpoint` wrote. Raises RecordError where there is none."""
    path = run_dir / CHECKPOINT_FILE
    if not path.is_file():
        raise RecordError(f"{path}: no such file, wanted the folder of a run to go on with (one over Flower has none)")
    return path


def described(config: RunConfig, alike: Mapping[str, str]) -> dict[str, str]:
    """What a run keeps of itself: the configuration, and the digests of what must be alike."""
    return {"config": dump_config(config), "alike": json.dumps(dict(alike))}


def kept_of(run_dir: Path, config: RunConfig) -> dict[str, str]:
    """The digests that a run was interrupted with. Raises RecordError where ``config`` is no longer that run's."""
    path = checkpoint_of(run_dir)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        before, now = (dict(flat_settings(tomllib.loads(text))) for text in (metadata["config"], dump_config(config)))
        alike = dict(json.loads(metadata["alike"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path}: not a checkpoint of this version of fibecfed ({error})") from None
    for key in sorted(before.keys() | now.keys()):
        if key not in MAY_CHANGE and before.get(key) != now.get(key):
            found, wanted = (values.get(key, "unset") for values in (now, before))
            raise RecordError(
                f"{run_dir / 'config.toml'}: {key} is {found}, wanted {wanted} as when the run was interrupted"
            )
    return alike


def load_checkpoint(run_dir: Path, server: Server, store: LocalStore, devices: list[Device]) -> tuple[int, float]:
    """Put back what :func:`save_checkpoint` wrote; returns the round and the seconds spent until then.

    Raises RecordError when there is no checkpoint, it cannot be read, or it is another run's.
    """
    path = checkpoint_of(run_dir)
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise RecordError(f"{path}: {error}") from None
    wanted = {
        "global": server.values.shape,
        "local": store.rows.shape,
        "residuals": store.residuals.shape,
        "participations": (len(devices),),
    }
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != torch.Size(shape):
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise RecordError(f"{path}: {name} is {found}, wanted {tuple(shape)}: it belongs to another run")
    server.values = tensors["global"].to(server.values.device)
    store.rows.copy_(tensors["local"])
    store.residuals.copy_(tensors["residuals"])
    for device in devices:
        device.rounds = int(tensors["participations"][device.index])
        scores = tensors.get(f"scores.{device.index}")
        device.scores = None if scores is None else scores.numpy()
        device.importance = tensors.get(f"importance.{device.index}")
    return int(metadata["round"]), float(metadata["elapsed"])
