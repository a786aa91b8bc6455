"""The nodes of a Flower grid: who of them are the devices, and questions to them with what they answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Generic, NamedTuple

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from pydantic import BaseModel
from torch import Tensor

from .messages import Hello, MessageError, Nothing, Values, decode, encode, encode_adapter

log = logging.getLogger("flwr")  # what Flower shows of a run
LONGEST_REASON = 500  # characters that are kept of what a node says went wrong
LONGEST_PAUSE = 1.0  # seconds between two looks for answers
GONE = {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}


class FleetError(ValueError):
    """Nodes that cannot be the devices of a run; says which and why."""


class Answer(NamedTuple, Generic[Values]):
    """What one of those asked said, with all that came along, or what went wrong."""

    device: int
    values: Values | None
    records: RecordDict
    problem: str = ""


class Nodes:
    """Nodes ``ids[0]``, ``ids[1]``, … of a grid, which are the devices 0, 1, …; ``timeout``: seconds that an answer may
    take."""

    def __init__(self, grid: Grid, ids: list[int], timeout: float) -> None:
        self.ids, self._grid, self._timeout = ids, grid, timeout

    def __len__(self) -> int:
        return len(self.ids)

    def ask(
        self, name: str, kind: type[Values], questions: Mapping[int, BaseModel], message: Tensor | None = None
    ) -> Iterator[Answer[Values]]:
        """The answers in the order of the questions, each as soon as it and those before it are there."""
        adapter = None if message is None else encode_adapter(message)
        sent = [
            Message(encode(question, adapter), self.ids[device], name, ttl=self._timeout)
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

    def needed(self, answer: Answer[Values]) -> Values:
        """What was said. Raises FleetError, naming device and node, where that is nothing."""
        if answer.values is None:
            raise FleetError(f"device {answer.device} (node {self.ids[answer.device]}): {answer.problem}")
        return answer.values


def gather(grid: Grid, devices: int, timeout: float) -> dict[int, Hello]:
    """{node: what it said} in the order of the devices: by ``partition``, or by node where each has data of its own.

    Waits for every node that Flower lists, and for so many that answer; a node that is not there any more, or whose
    answer is a problem, takes no part, nor do those that come later. Of nodes with data of their own only the first
    take part where there are more than ``devices``.

    Raises FleetError where there are not enough after ``timeout`` seconds, or what they have does not fit together.
    """
    found = _Gathering(grid, timeout)
    log.info("waiting for %d nodes", devices)
    while time.monotonic() < found.until:
        there = found.look()
        if not found.waiting and max(there, len(found.hellos)) >= devices:
            break
        time.sleep(LONGEST_PAUSE / 10 if found.waiting else LONGEST_PAUSE)
    late = dict.fromkeys(found.waiting.values(), f"no answer within {timeout:g} s")
    absent = {**found.problems, **late}
    if len(found.hellos) < devices:
        reasons = "".join(f"; node {node}: {reason}" for node, reason in absent.items())
        raise FleetError(f"{len(found.hellos)} nodes have answered, wanted partition.devices = {devices}{reasons}")
    chosen = _in_order(dict(sorted(found.hellos.items())), devices)
    for node in found.hellos.keys() - chosen.keys():
        absent[node] = f"there are partition.devices = {devices} before it"
    for node, reason in absent.items():
        log.warning("node %d takes no part: %s", node, reason)
    for device, node in enumerate(chosen):
        log.info("device %d is node %d", device, node)
    return chosen


class _Gathering:
    """Who is asked (``waiting``: {message: node}), who said what, and with whom something is wrong."""

    def __init__(self, grid: Grid, timeout: float) -> None:
        self._grid, self._timeout, self.until = grid, timeout, time.monotonic() + timeout
        self._asked: set[int] = set()
        self.waiting: dict[str, int] = {}
        self.hellos: dict[int, Hello] = {}
        self.problems: dict[int, str] = {}

    def look(self) -> int:
        """Ask nodes that are new, and take the answers that are there. Gives the number of nodes that are there."""
        listed = set(self._grid.get_node_ids())
        new = sorted(listed - self._asked)
        self._asked |= listed
        sent = [Message(encode(Nothing()), node, "query.hello", ttl=self._timeout) for node in new]
        for name, node in zip(self._grid.push_messages(sent), new, strict=True):
            self.problems.pop(node, None)
            if name:
                self.waiting[name] = node
            else:
                self.problems[node] = "no message reached it"
        while self.waiting and (replies := list(self._grid.pull_messages(set(self.waiting)))):
            for reply in replies:
                node = self.waiting.pop(reply.metadata.reply_to_message_id)
                self._take(node, _answer(0, Hello, reply, ""))
                if reply.has_error() and reply.error.code in GONE:
                    self._asked.discard(node)  # it is asked again where it is back
        return len(listed & self._asked)

    def _take(self, node: int, answer: Answer[Hello]) -> None:
        hello = answer.values
        if hello is None:
            self.problems[node] = answer.problem
        elif hello.partition is None and not (hello.train and hello.test and hello.classes):
            self.problems[node] = f"{hello.train} samples to train and {hello.test} to test on, wanted some"
        else:
            self.hellos[node] = hello


def _in_order(hellos: dict[int, Hello], devices: int) -> dict[int, Hello]:
    """Nodes and what they said in the order of the devices."""
    parts = sorted(hello.partition for hello in hellos.values() if hello.partition is not None)
    if not parts:
        chosen = dict(list(hellos.items())[:devices])
        pairs = [node for node, hello in chosen.items() if hello.pair]
        if 0 < len(pairs) < devices:
            raise FleetError(f"nodes {', '.join(map(str, pairs))} have pairs of texts (data.pair), others have not")
        return chosen
    if len(parts) < len(hellos):
        raise FleetError("some nodes have data of their own (data.source) and some a partition-id, wanted all or none")
    if parts != list(range(devices)):
        raise FleetError(
            f"partition-id of the nodes: {parts}, wanted each of 0 … {devices - 1} once, as many as partition.devices"
        )
    return dict(sorted(hellos.items(), key=lambda one: one[1].partition or 0))


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
