"""A grid without a network: messages go through Flower's own bytes to a ClientApp and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fibecfed.flower.client_app import app

Spoil = Callable[[int, Message], Message | None]


class LocalGrid(Grid):
    """Nodes 100, 101, …; ``spoil(node, reply)`` may change an answer on its way, None: it is lost; what is
    ``unreachable(node, kind)`` is not taken; ``listed(look)``: which nodes are there at each look, None: all."""

    def __init__(
        self,
        run_config: dict[str, Any],
        node_configs: list[dict[str, Any]],
        spoil: Spoil = lambda node, reply: reply,
        unreachable: Callable[[int, str], bool] = lambda node, kind: False,
        listed: Callable[[int], Iterable[int]] | None = None,
    ) -> None:
        self.contexts = {
            100 + place: Context(1, 100 + place, dict(config), RecordDict(), dict(run_config))
            for place, config in enumerate(node_configs)
        }
        # whose messages those made in this process are
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self.spoil, self.unreachable, self.listed = spoil, unreachable, listed
        self._looks = itertools.count()
        self._replies: dict[str, Message] = {}
        self._names = map(str, itertools.count())

    def set_run(self, run: Any) -> None:
        raise AssertionError("not asked for")

    @property
    def run(self) -> Any:
        raise AssertionError("not asked for")

    def create_message(self, *args: Any, **options: Any) -> Message:
        raise AssertionError("deprecated")

    def get_node_ids(self) -> Iterable[int]:
        return list(reversed(self.contexts)) if self.listed is None else self.listed(next(self._looks))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """For a message that is not taken Flower gives None for its name."""
        names: list[Any] = []
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = name = next(self._names)
            if self.unreachable(node, message.metadata.message_type):
                names.append(None)
                continue
            names.append(name)
            arrived = message_from_proto(message_to_proto(message))
            try:
                reply = app(arrived, self.contexts[node])
            except Exception as error:  # as Flower does
                reply = Message(Error(code=1, reason=f"{type(error)}:<'{error}'>"), reply_to=arrived)
            spoilt = self.spoil(node, message_from_proto(message_to_proto(reply)))
            if spoilt is not None:
                self._replies[name] = spoilt
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The last of those that are there: answers come in any order."""
        assert None not in message_ids
        there = [name for name in message_ids if name in self._replies]
        return [self._replies.pop(max(there, key=int))] if there else []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise AssertionError("not asked for")
