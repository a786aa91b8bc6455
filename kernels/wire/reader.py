"""From the bytes of a message to its data, by every check."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .errors import LengthError, RoundError
from .format import LENGTH_BYTES, Message
from .frame import Frame
from .header import check_agreed, size_of
from .parsing import parsed
from .rows import Rows

OWN = -1.0  # as a weight: the message's own sample count


class Opened(NamedTuple):
    """A message that passed every check: its bytes, where its data begins. rows: those of a sparse one. decoded: its
    values are in the target."""

    frame: Frame
    raw: Tensor
    start: int
    message: Message
    rows: Tensor | None
    decoded: bool

    @property
    def payload(self) -> Tensor:
        return self.raw[self.start :]


class Target(NamedTuple):
    """Where values are to go when they are good; ``table`` says where in ``buffer`` (:meth:`Frame.read_ours`)."""

    buffer: Tensor
    table: Tensor
    weight: float = 0.0


def opened(
    raw: Tensor,
    frame: Frame,
    rows: Rows | None,
    target: Target,
    round: int | None,
    base: int,
    max_bytes: int | None,
) -> Opened:
    """Check a message, uint8 in host memory. ``frame``: of one that carries every row.

    One laid out as ours is checked and decoded in one pass. Any other is parsed, to be read when it says the same in
    other words (spaces, order of keys, a later minor version), else refused.
    """
    if max_bytes is not None and len(raw) > max_bytes:
        raise LengthError("length", f"{len(raw)} bytes, wanted at most {max_bytes} (max_bytes)")
    message = frame.read_ours(raw, target.table, round, base, target.buffer, target.weight)
    if message is not None:
        return Opened(frame, raw, frame.header.nbytes, message, None, True)
    size = size_of(raw[:LENGTH_BYTES].numpy().tobytes(), len(raw), frame.header.limit)
    header = parsed(raw[LENGTH_BYTES:size].numpy().tobytes())
    payload, indices = raw[size:], None
    if rows is not None:
        check_agreed(header.get("__metadata__"), frame.agreed)
        frame = Frame(rows.declared(header), frame.agreed)
    message = frame.check(header, payload, base)
    if round is not None and message.round != round:
        raise RoundError("metadata.round", f"{message.round}, wanted {round}")
    if rows is not None:
        indices = rows.read(frame.indices(payload), frame.parts)
    return Opened(frame, raw, size, message, indices, False)
