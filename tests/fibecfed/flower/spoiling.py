"""Answers that are spoilt on their way."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message

Spoil = Callable[[Message], Message | None]


def lost(reply: Message) -> None:
    return None


def failed(reply: Message) -> Message:
    return Message(Error(code=2, reason="<class 'ValueError'>:<'two\nlines'>"), reply_to=asked(reply))


def asked(reply: Message) -> Message:
    """A question that a reply to it goes the way of ``reply``."""
    reply.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    node = reply.metadata.src_node_id
    reply.metadata.__dict__["_src_node_id"], reply.metadata.__dict__["_dst_node_id"] = 1, node
    return reply


def saying(text: Any) -> Spoil:
    def spoil(reply: Message) -> Message:
        reply.content["fibecfed"] = ConfigRecord({"json": text})
        return reply

    return spoil


def changing(**values: Any) -> Spoil:
    """What was said, but for these values."""

    def spoil(reply: Message) -> Message | None:
        said = json.loads(str(reply.content["fibecfed"]["json"]))  # type: ignore[call-overload,index]
        return saying(json.dumps(said | values))(reply)

    return spoil


def without(record: str) -> Spoil:
    def spoil(reply: Message) -> Message:
        del reply.content[record]
        return reply

    return spoil


def carrying(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(reply: Message) -> Message:
        data = change(reply.content["adapter"]["adapter"].data)  # type: ignore[call-overload,index,union-attr]
        reply.content["adapter"] = ArrayRecord({"adapter": Array("uint8", (len(data),), "safetensors", data)})
        return reply

    return spoil


def shouted(reply: Message) -> Message:
    return Message(Error(code=2, reason="\x1b[31m" + "A" * 10**6), reply_to=asked(reply))
