"""Every way in which a message, or a set of messages, is refused. All are ValueErrors that name the field."""

from __future__ import annotations

from typing import Self


class WireError(ValueError):
    """A message, weight or value that the wire refuses.

    ``field`` names what was wrong ("length", "metadata.round", "a tensor's name.shape", …), ``problem`` says what was
    found and what was wanted, ``index`` is the message's place among those given to :func:`aggregate`, else None.
    """

    def __init__(self, field: str, problem: str, index: int | None = None) -> None:
        super().__init__(field, problem, index)  # all three, so that the error survives a process boundary
        self.field, self.problem, self.index = field, problem, index

    def __str__(self) -> str:
        return f"{'' if self.index is None else f'message {self.index}: '}{self.field}: {self.problem}"

    def at(self, index: int) -> Self:
        """The same error, of the message at ``index``."""
        return type(self)(self.field, self.problem, index)


class LengthError(WireError):
    """Shorter or longer than its header and the plan say: cut off, or with bytes after the end."""


class HeaderError(WireError):
    """The header is too long, not aligned, or not the JSON of a safetensors file."""


class DuplicateKeyError(HeaderError):
    """A key stands twice in one JSON object of the header."""


class FormatError(WireError):
    """A safetensors file, but not a fibecfed message."""


class VersionError(WireError):
    """A version of the format that this reader does not know."""


class MetadataError(WireError):
    """A metadata field is missing or not of its form."""


class SchemaError(WireError):
    """Made for another base model, adapter, choice of layers, wire dtype or kind of plan.

    Compare ``plan.fingerprint`` at both ends and, where they differ, ``flat.identity``, the names and shapes in
    ``flat.entries``, and the plan's arguments: the fingerprint is of these.
    """


class NamesError(WireError):
    """A tensor is missing, or one is there that the plan does not know."""


class DtypeError(WireError):
    """A tensor is of another dtype than planned."""


class ShapeError(WireError):
    """A tensor is of another shape than planned."""


class OffsetsError(WireError):
    """A tensor does not lie where the plan has it: a hole, an overlap, another order."""


class ChecksumError(WireError):
    """The bytes of a payload or of the metadata are not those that were sent."""


class NotFiniteError(WireError):
    """A value is infinite or NaN."""


class RangeError(WireError):
    """A finite value that the wire dtype cannot hold (packing only)."""


class BaseError(WireError):
    """The message is relative to other values than those given as its base."""


class RowsError(WireError):
    """The rows of a sparse message do not ascend, or one is beyond its parameter."""


class RoundError(WireError):
    """The message is of another round than asked for."""


class WeightError(WireError):
    """A weight is not a finite number above zero, within the range that float64 can average."""


class CountError(WireError):
    """No messages, or not as many weights as messages."""
