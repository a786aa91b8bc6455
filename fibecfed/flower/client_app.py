"""A Flower node as one device of FibecFed.

A node's process may end after every message, so what a device keeps between its rounds (local layers, scores,
importances, what its last message lost) lies in Flower's context of the node.
"""

from __future__ import annotations

import tomllib
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fibecfed_kernels import WirePlan

from ..alike import difference, digests
from ..client import Device
from ..config import ConfigError, RunConfig, dump_config
from ..federation import Federation, build, build_own, load_data, own_classes
from ..fleet import LocalFleet
from ..record import SilentObserver
from ..stopwatch import Stopwatch
from .messages import (
    Decided,
    Hello,
    Last,
    Left,
    MessageError,
    Nothing,
    Place,
    Sensitivities,
    Spectrum,
    Test,
    Tested,
    Trained,
    Work,
    decode,
    decode_adapter,
    encode,
    encode_adapter,
)
from .settings import run_config

STATE = "fibecfed"
OWN, PARTITION = "data.source", "partition-id"

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Which part of the run's data is this node's, or what it has of its own."""
    decode(Nothing, message.content)
    if OWN not in context.node_config:
        return Message(encode(Hello(partition=_partition(context))), reply_to=message)
    config = run_config(context.run_config, context.node_config)
    classes = own_classes(config)
    task = load_data(config, classes)
    sizes = {"train": len(task.train), "test": len(task.test)}
    found = Hello(partition=None, **sizes, classes=list(classes), pair=config.data.pair is not None)
    return Message(encode(found), reply_to=message)


@app.query("sensitivity")
def sensitivity(message: Message, context: Context) -> Message:
    """Step 3 on this device."""
    (found,) = _Node(context, decode(Place, message.content)).fleet.sensitivities()
    return Message(encode(Sensitivities(values=found.tolist())), reply_to=message)


@app.query("spectrum")
def spectrum(message: Message, context: Context) -> Message:
    """Step 4 on this device."""
    asked = decode(Spectrum, message.content)
    (found,) = _Node(context, asked).fleet.decisions([0], asked.layer)
    return Message(encode(Decided(**found.to_record())), reply_to=message)


@app.query("score")
def score(message: Message, context: Context) -> Message:
    """Steps 1, 2 and 5 on this device; the scores stay here."""
    node = _Node(context, decode(Work, message.content))
    for _ in node.fleet.score_all():
        node.keep()
    return Message(encode(Nothing()), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Steps 7 and 8 on this device."""
    work = decode(Work, message.content)
    node = _Node(context, work)
    broadcast = decode_adapter(message.content)
    (upload,) = node.fleet.train([0], broadcast, work.round, work.share, Stopwatch(), SilentObserver().on_phase)
    assert upload.result is not None
    assert upload.message is not None
    node.keep()
    trained = Trained(**upload.result._asdict())
    return Message(encode(trained, encode_adapter(upload.message)), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Right answers on this device's test samples; the adapter that is tested comes in float32, whatever the wire's."""
    test = decode(Test, message.content)
    node = _Node(context, test)
    fleet, device = node.fleet, node.device
    WirePlan(fleet.flat, test.gal, "float32").load(decode_adapter(message.content), fleet.flat, round=test.round)
    labels = fleet.fed.task.test.labels[device.test]
    found: dict[str, int | None] = {"whole": None, "own": None}
    if test.whole:  # with the initial local layers, which the buffer holds by now
        found["whole"] = int((fleet.client.predict(device.test) == labels).sum())
    if test.own:
        fleet.store.load(0)
        found["own"] = int((fleet.client.predict(device.test) == labels).sum())
    return Message(encode(Tested(tested=len(labels), **found)), reply_to=message)


@app.query("last")
def last(message: Message, context: Context) -> Message:
    """The last upload: this device's local layers."""
    asked = decode(Last, message.content)
    fleet = _Node(context, asked).fleet
    local = [layer for layer in fleet.flat.layers if layer not in set(asked.gal)]
    for upload in fleet.last_uploads(WirePlan(fleet.flat, local, dtype=asked.dtype)):
        assert upload.message is not None
        return Message(encode(Left(trained=True), encode_adapter(upload.message)), reply_to=message)
    return Message(encode(Left(trained=False)), reply_to=message)


def _partition(context: Context) -> int:
    part = context.node_config.get(PARTITION)
    if not isinstance(part, int) or isinstance(part, bool) or part < 0:
        raise ConfigError(f"node config {PARTITION} = {part!r}: wanted a number from 0, or {OWN}: data of its own")
    return part


class _Node:
    """This device, with what it kept from its rounds before; the adapter is the initial one."""

    def __init__(self, context: Context, place: Place) -> None:
        config, own = run_config(context.run_config, context.node_config), place.classes is not None
        made, initial, mine = _federation(dump_config(config), tuple(place.classes or ()), place.index if own else None)
        if not own and place.index != (part := _partition(context)):
            raise MessageError(f"asked as device {place.index}, wanted {part}, this node's {PARTITION}")
        if problem := difference(place.alike, mine, "the server's"):
            raise MessageError(problem)
        made.flat.copy_(initial)
        there = made.devices[0 if own else place.index]
        self.device = Device(place.index, there.train, there.test)
        self.fleet = LocalFleet(replace(made, devices=[self.device]))
        self._context = context
        if isinstance(place, Work):
            self.fleet.divide(place.gal, place.shares)
            self._restore()

    def _restore(self) -> None:
        kept = self._context.state.get(STATE)
        if not isinstance(kept, ArrayRecord):
            return
        found = {name: array.numpy() for name, array in kept.items()}
        store, device = self.fleet.store, self.device
        store.rows[0] = torch.from_numpy(found["local"])
        store.residuals[0] = torch.from_numpy(found["residual"])
        device.rounds = int(found["rounds"])
        device.scores = found.get("scores")
        device.importance = torch.from_numpy(found["importance"]) if "importance" in found else None

    def keep(self) -> None:
        """Leave what the device has now for its next round."""
        store, device = self.fleet.store, self.device
        kept = {
            "local": store.rows[0].cpu().numpy(),
            "residual": store.residuals[0].cpu().numpy(),
            "rounds": np.array(device.rounds),
        }
        if device.scores is not None:
            kept["scores"] = device.scores
        if device.importance is not None:
            kept["importance"] = device.importance.numpy()
        self._context.state[STATE] = ArrayRecord({name: Array(array) for name, array in kept.items()})


@lru_cache(maxsize=1)  # a process may work for several devices in turn: data and model are loaded once
def _federation(config: str, classes: tuple[str, ...], own: int | None) -> tuple[Federation, Tensor, dict[str, str]]:
    """Of a configuration as TOML: what its devices share, or the federation of one with data of its own; the initial
    adapter; and the digests of what must be alike."""
    made = RunConfig.model_validate(tomllib.loads(config))
    fed = build(made) if own is None else build_own(made, classes, own)
    return fed, fed.flat.data.detach().clone(), digests(fed, data=own is None)
