"""The nodes of a Flower grid as the devices of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, cast

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from pydantic import BaseModel
from torch import Tensor

from fibecfed_kernels import WirePlan

from ..client import Client, TrainResult
from ..config import RunConfig
from ..data import DataError, merge_classes
from ..evaluation import evaluate_global
from ..federation import Federation, build, build_without_data
from ..fleet import Census, LocalFleet, OnPhase
from ..lossless import Decision
from ..server import LocalStore, Server, Upload, weighted_mean
from ..stopwatch import Stopwatch
from .messages import (
    Decided,
    Hello,
    Last,
    MessageError,
    Nothing,
    Place,
    Sensitivities,
    Spectrum,
    Test,
    Tested,
    Trained,
    Values,
    Work,
    decode,
    decode_adapter,
    encode,
    encode_adapter,
)

log = logging.getLogger("flwr")  # what Flower shows of a run
LONGEST_REASON = 500  # characters that are kept of what a node says went wrong
LONGEST_PAUSE = 1.0  # seconds between two looks for answers


class FleetError(ValueError):
    """Nodes that cannot be the devices of a run; says which and why."""


class Answer(NamedTuple, Generic[Values]):
    """What one of those asked said, with all that came along, or what went wrong."""

    device: int
    values: Values | None
    records: RecordDict
    problem: str = ""


class FlowerFleet:
    """Nodes 0 … K − 1 of a grid, in the order of their partitions, or of their ids where they have data of their own.

    Nodes that come later take no part. What a device keeps between its rounds lies on its node. Raises FleetError where
    nodes are missing, or their data does not fit together.
    """

    def __init__(self, grid: Grid, config: RunConfig, timeout: float) -> None:
        self._grid, self._timeout, self.config = grid, timeout, config
        self._nodes = self._wait(config.partition.devices)
        hellos = [
            self._needed(answer)
            for answer in self._ask("query.hello", Hello, dict.fromkeys(range(len(self._nodes)), Nothing()))
        ]
        self._nodes, self._hellos = _in_order(self._nodes, hellos, config)
        self.fed, self._here, self._classes = self._made()
        self.flat = self.fed.flat
        self.client = Client(self.flat, self.fed.train, self.fed.test, config, gal=self.flat.layers)
        self.store: LocalStore
        self._work: dict[str, Any] = {}
        self._trained: set[int] = set()

    def _made(self) -> tuple[Federation, LocalFleet | None, list[str] | None]:
        """Data and model; where data is the run's own, what could be done with it here; else the classes of all."""
        if self._hellos[0].classes is None:
            fed = build(self.config)
            return fed, LocalFleet(fed), None
        try:
            classes = merge_classes(hello.classes or () for hello in self._hellos)
        except DataError as error:
            raise FleetError(str(error)) from None
        return build_without_data(self.config, classes), None, list(classes)

    @property
    def sizes(self) -> np.ndarray:
        return self.fed.sizes if self._here is not None else np.array([hello.train for hello in self._hellos])

    def samples(self) -> dict[str, int]:
        if self._here is not None:
            return self._here.samples()
        return {name: sum(getattr(hello, name) for hello in self._hellos) for name in ("train", "test")}

    def census(self) -> Census:
        if self._here is not None:
            return self._here.census()
        return Census(None, None, [{"size": int(size), "labels": []} for size in self.sizes])

    def scores(self) -> np.ndarray:
        return np.zeros(0)  # they stay on the nodes

    # -- initialization phase ------------------------------------------------------------------------------------

    def sensitivities(self) -> Iterator[Tensor]:
        places, model = self._about(Place, range(len(self._nodes))), cast(Any, self.flat.model)
        for answer in self._ask("query.sensitivity", Sensitivities, places):
            values = self._needed(answer).values
            if len(values) != (blocks := model.config.num_hidden_layers):
                raise FleetError(f"device {answer.device}: {len(values)} sensitivities, wanted {blocks}, one a block")
            yield torch.tensor(values, dtype=torch.float64)

    def decisions(self, asked: Sequence[int], layer: int | None = None) -> Iterator[Decision]:
        for answer in self._ask("query.spectrum", Decided, self._about(Spectrum, asked, layer=layer)):
            yield Decision(**self._needed(answer).model_dump())

    def divide(self, gal: Sequence[int], shares: Mapping[int, float]) -> None:
        self.client.gal = tuple(gal)
        if shares:
            self.client.neuron_share = dict(shares)
        self.store = LocalStore(self.flat, gal, 0)
        self._work = {"gal": list(gal), "shares": dict(shares)}

    def score_all(self) -> Iterator[int]:
        for answer in self._ask("query.score", Nothing, self._about(Work, range(len(self._nodes)))):
            self._needed(answer)
            yield int(self.sizes[answer.device])

    # -- tuning phase --------------------------------------------------------------------------------------------

    def train(
        self, drawn: Sequence[int], broadcast: Tensor, t: int, share: float, watch: Stopwatch, on_phase: OnPhase
    ) -> Iterator[Upload]:
        work = self._about(Work, drawn, round=t, share=share)
        answers = self._ask("train", Trained, work, broadcast)
        for done in range(len(drawn)):
            with watch.phase("train"):  # as long as the server waits for it
                answer = next(answers)
            on_phase(f"round {t}", done + 1, len(drawn))
            yield self._upload(answer, TrainResult(**answer.values.model_dump()) if answer.values else None)

    def _upload(self, answer: Answer[Any], result: TrainResult | None = None) -> Upload:
        if answer.values is None:
            return Upload(answer.device, problem=answer.problem)
        self._trained.add(answer.device)
        try:
            return Upload(answer.device, decode_adapter(answer.records), result)
        except MessageError as error:
            return Upload(answer.device, problem=str(error))

    def evaluate(self, server: Server, on_phase: OnPhase) -> dict[str, Any]:
        own, here = self.config.eval.personal, self._here is not None
        found = evaluate_global(self.fed, self.client, server, self.store) if here else {}
        if here and not own:
            return found
        server.put()
        plan = WirePlan(self.flat, server.down.layers, "float32")
        message = plan.pack(self.flat, round=0, num_samples=0)
        asked = self._about(Test, range(len(self._nodes)), whole=not here, own=own)
        right: dict[int, Tested] = {}
        for answer in self._ask("evaluate", Tested, asked, message):
            on_phase("evaluate", answer.device + 1, len(self._nodes))
            problem = answer.problem if answer.values is None else answer.values.problem(whole=not here, own=own)
            if answer.values is None or problem:
                log.warning("device %d is not evaluated: %s", answer.device, problem)
            else:
                right[answer.device] = answer.values
        if right and not here:
            tested = sum(one.tested for one in right.values())
            found["global_accuracy"] = sum(one.whole or 0 for one in right.values()) / tested
        if right and own:
            shares = [(one.own or 0) / one.tested for one in right.values()]
            found["personal_accuracy"] = weighted_mean(shares, self.sizes[list(right)])
        return found

    def last_uploads(self, plan: WirePlan) -> Iterator[Upload]:
        for answer in self._ask("query.last", Nothing, self._about(Last, sorted(self._trained), dtype=plan.dtype)):
            yield self._upload(answer)

    # -- questions and answers -----------------------------------------------------------------------------------

    def _about(self, kind: type[Place], devices: Sequence[int], **more: Any) -> dict[int, BaseModel]:
        """The question to each of the devices."""
        work = self._work if issubclass(kind, Work) else {}
        return {device: kind(index=device, classes=self._classes, **work, **more) for device in devices}

    def _needed(self, answer: Answer[Values]) -> Values:
        if answer.values is None:
            raise FleetError(f"device {answer.device} (node {self._nodes[answer.device]}): {answer.problem}")
        return answer.values

    def _ask(
        self, name: str, kind: type[Values], questions: Mapping[int, BaseModel], message: Tensor | None = None
    ) -> Iterator[Answer[Values]]:
        """The answers in the order of the questions, each as soon as it and those before it are there."""
        adapter = None if message is None else encode_adapter(message)
        sent = [
            Message(encode(question, adapter), self._nodes[device], name, ttl=self._timeout)
            for device, question in questions.items()
        ]
        waiting = {identity for identity in self._grid.push_messages(sent) if identity}
        asked = {one.metadata.message_id: device for one, device in zip(sent, questions, strict=True)}
        del sent
        there: dict[int, Message] = {}
        until, pause = time.monotonic() + self._timeout, 0.01
        for device in questions:
            while device not in there and waiting and time.monotonic() < until:
                for reply in self._grid.pull_messages(waiting):
                    waiting.discard(reply.metadata.reply_to_message_id)
                    there[asked[reply.metadata.reply_to_message_id]] = reply
                    pause = 0.01
                if device not in there:
                    time.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
            late = f"no answer within {self._timeout:g} s" if waiting else "no message reached it"
            yield _answer(device, kind, there.pop(device, None), late)

    def _wait(self, wanted: int) -> list[int]:
        """The nodes of the grid, once there are as many as wanted."""
        until = time.monotonic() + self._timeout
        log.info("waiting for %d nodes", wanted)
        while len(nodes := sorted(self._grid.get_node_ids())) < wanted:
            if time.monotonic() > until:
                raise FleetError(f"{len(nodes)} nodes after {self._timeout:g} s, wanted partition.devices = {wanted}")
            time.sleep(LONGEST_PAUSE)
        return nodes


def _answer(device: int, kind: type[Values], reply: Message | None, late: str) -> Answer[Values]:
    if reply is None:
        return Answer(device, None, RecordDict(), late)
    if reply.has_error():
        return Answer(device, None, RecordDict(), _cut(reply.error.reason or "an error without a reason"))
    try:
        return Answer(device, decode(kind, reply.content), reply.content)
    except MessageError as error:
        return Answer(device, None, reply.content, _cut(str(error)))


def _cut(text: str) -> str:
    """A line of at most LONGEST_REASON characters that may stand in a terminal: a node can send anything."""
    line = " ".join(text[: 10 * LONGEST_REASON].split())
    line = "".join(one if one.isprintable() else "?" for one in line)
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]} …"


def _in_order(nodes: Sequence[int], hellos: Sequence[Hello], config: RunConfig) -> tuple[list[int], list[Hello]]:
    """Nodes and what they said in the order of the devices."""
    parts = [hello.partition for hello in hellos if hello.partition is not None]
    if not parts:
        for node, hello in zip(nodes, hellos, strict=True):
            if not (hello.train and hello.test and hello.classes):
                raise FleetError(
                    f"node {node} has {hello.train} samples to train and {hello.test} to test on, wanted some"
                )
        return list(nodes), list(hellos)
    if len(parts) < len(hellos):
        raise FleetError("some nodes have data of their own (data.source) and some a partition-id, wanted all or none")
    if sorted(parts) != list(range(config.partition.devices)):
        raise FleetError(
            f"partition-id of the nodes: {sorted(parts)}, wanted each of 0 … {config.partition.devices - 1} once, as "
            f"many as partition.devices"
        )
    order = np.argsort(parts)
    return [nodes[place] for place in order], [hellos[place] for place in order]
