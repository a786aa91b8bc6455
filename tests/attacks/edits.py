"""What attacks are made with: a good message, and ways to change one thing in it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .writer import FLOAT32, Kind, Parts, Payload, file, laid_out, parts, payloads, sealed

A, B = "block.1.lora_A.weight", "block.1.lora_B.weight"
GAIN = "head.gain"
A_BYTES = 24  # of A's payload in float32, which starts the data; B's follows
Header = dict[str, Any]
GOOD = file(*parts())
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")
TEXT, DATA = GOOD[8:HEADER_END], GOOD[HEADER_END:]


@dataclass(frozen=True)
class Attack:
    """One file: ``name``.safetensors, the WireError class and field of its refusal, its bytes, its receiver."""

    name: str
    error: str
    field: str
    message: bytes
    kind: Kind = FLOAT32
    round: int | None = None  # that the receiver asks for


def header_with(edit: Callable[[Header], object], fit: bool = True, kind: Kind = FLOAT32) -> bytes:
    """The good message with its header changed; ``fit``: checksums and seal are made to fit afterwards."""
    header, data = parts(kind)
    edit(header)
    return file(sealed(header, data) if fit else header, data)


def metadata(fit: bool = True, kind: Kind = FLOAT32, **fields: Any) -> bytes:
    return header_with(lambda header: header["__metadata__"].update(fields), fit, kind)


def no_metadata(key: str, fit: bool = False, kind: Kind = FLOAT32) -> bytes:
    return header_with(lambda header: header["__metadata__"].pop(key), fit, kind)


def tensor(fit: bool = True, kind: Kind = FLOAT32, name: str = A, **fields: Any) -> bytes:
    return header_with(lambda header: header[name].update(fields), fit, kind)


def text_with(old: str, new: str) -> bytes:
    """The good message with the first ``old`` in its header's text replaced, and padded again."""
    changed = TEXT.rstrip(b" ").replace(old.encode(), new.encode(), 1)
    assert old.encode() in TEXT
    return file(changed + b" " * (-len(changed) % 8), DATA)


def data_with(at: int, raw: bytes, fit: bool = True, kind: Kind = FLOAT32) -> bytes:
    """The good message with the data's bytes from ``at`` on replaced by ``raw``."""
    header, data = parts(kind)
    data = data[:at] + raw + data[at + len(raw) :]
    return file(sealed(header, data) if fit else header, data)


def payload_with(name: str, raw: bytes, kind: Kind, at: int = 0, fit: bool = True) -> bytes:
    """The good message with the bytes of one payload from ``at`` on replaced by ``raw``."""
    return data_with(parts(kind)[0][name]["data_offsets"][0] + at, raw, fit, kind)


def repacked(kind: Kind, edit: Callable[[list[Payload]], Iterable[Payload]]) -> bytes:
    """The good message with other payloads, and a header that says so truly."""
    return file(*laid_out(parts(kind)[0]["__metadata__"], edit(payloads(kind, (1,)))))


def instead(kind: Kind, name: str, *others: Payload) -> bytes:
    """The good message with other payloads, or none, in place of one."""
    return repacked(kind, lambda of: [q for p in of for q in (others if p.name == name else (p,))])


def float32_bytes(x: float) -> bytes:
    return struct.pack("<f", x)


def permuted() -> Parts:
    """A and B have changed places in the data, and the header says so truly."""
    header, data = parts()
    header[B]["data_offsets"], header[A]["data_offsets"] = [0, A_BYTES], [A_BYTES, 2 * A_BYTES]
    data = data[A_BYTES : 2 * A_BYTES] + data[:A_BYTES] + data[2 * A_BYTES :]
    return sealed(header, data), data


def with_hole() -> Parts:
    """Eight bytes before B that belong to no tensor: room to hide something in."""
    header, data = parts()
    for name, info in header.items():
        if name not in ("__metadata__", A):
            info["data_offsets"] = [offset + 8 for offset in info["data_offsets"]]
    data = data[:A_BYTES] + b"\xaa" * 8 + data[A_BYTES:]
    return sealed(header, data), data


def overlapping() -> Parts:
    """B reads A's bytes again, and the data is shorter by as much."""
    header, data = parts()
    for name, info in header.items():
        if name not in ("__metadata__", A):
            info["data_offsets"] = [offset - A_BYTES for offset in info["data_offsets"]]
    data = data[:A_BYTES] + data[2 * A_BYTES :]
    return sealed(header, data), data
