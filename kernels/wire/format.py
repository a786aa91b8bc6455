"""What a message is made of: dtypes, tensors and the order of their bytes, the fingerprint. See FORMAT.md."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from ..layout import Entry

FORMAT, MAJOR = "fibecfed", "1"
ALIGNMENT = 8  # of the data, in bytes from the start of the message
DIGITS = 16  # of round and num_samples, so that every header of a plan has the same length
LENGTH_BYTES = 8  # of the header's length, little-endian, at the start of the file
BLOCK = 64  # values that share a scale in int4

WireDtype = Literal["float32", "bfloat16", "float16", "int8", "int4"]


class Stored(NamedTuple):
    """A dtype in a file: its code in safetensors, in torch, and which floats wire_digest looks for (0: none)."""

    code: str
    torch: torch.dtype
    kind: int


# how values are stored, in the order that csrc/wire_message.cpp knows; int4 as bytes of two values
DTYPES: dict[str, Stored] = {
    "float32": Stored("F32", torch.float32, 1),
    "bfloat16": Stored("BF16", torch.bfloat16, 2),
    "float16": Stored("F16", torch.float16, 3),
    "int8": Stored("I8", torch.int8, 0),
    "int4": Stored("U8", torch.uint8, 0),
}
SCALE, INDEX = Stored("F32", torch.float32, 4), Stored("I32", torch.int32, 0)
LARGEST_SCALE = 2.0**121  # scales are below it, so that what they scale is finite
LEVELS = {"int8": 127, "int4": 7}


class Payload(NamedTuple):
    """One tensor of a message: name, dtype, shape, and its bytes [start, stop) of the data."""

    name: str
    dtype: Stored
    shape: tuple[int, ...]
    start: int
    stop: int


class Message(NamedTuple):
    """What a message says of itself: the round it belongs to and the samples its sender trained on."""

    round: int
    num_samples: int


def scales_of(part: Entry, dtype: str) -> int:
    """Number of scales: one a row in int8, one a block of 64 values in int4."""
    return part.rows if dtype == "int8" else -(-part.numel // BLOCK) if dtype == "int4" else 0


def names_of(name: str, dtype: str, sparse: bool) -> list[str]:
    """The names of the tensors that a parameter becomes, the one of its values last."""
    return [f"{name}.rows"] * sparse + [f"{name}.scale"] * (dtype in LEVELS) + [name]


def payloads_of(parts: Sequence[Entry], dtype: str, sparse: bool) -> tuple[Payload, ...]:
    """The tensors of a message in the order of their bytes: indices, scales, values, so that all is aligned.

    parts: what of each parameter travels, in a sparse message with as many rows as are sent; offsets are not looked at.
    """
    wanted: list[tuple[str, Stored, tuple[int, ...]]] = []
    if sparse:
        wanted += [(f"{p.name}.rows", INDEX, (p.rows,)) for p in parts]
    if dtype in LEVELS:
        wanted += [(f"{p.name}.scale", SCALE, (scales_of(p, dtype),)) for p in parts]
    wanted += [(p.name, DTYPES[dtype], (-(-p.numel // 2),) if dtype == "int4" else p.shape) for p in parts]
    payloads, start = [], 0
    for name, stored, shape in wanted:
        payloads.append(Payload(name, stored, shape, start, start + math.prod(shape) * stored.torch.itemsize))
        start = payloads[-1].stop
    return tuple(payloads)


def fingerprint_of(
    identity: Mapping[str, str], entries: Sequence[Entry], layers: Sequence[int], dtype: str, **options: bool
) -> str:
    """SHA-256 (hex) of the canonical JSON of what sender and receiver must agree on; options are named where they are
    on."""
    agreed = {
        "dtype": dtype,
        "identity": dict(identity),
        "layers": list(layers),
        "tensors": [[e.name, list(e.shape)] for e in entries],
        **{name: True for name, on in options.items() if on},
    }
    return hashlib.sha256(canonical(agreed).encode("ascii")).hexdigest()


def canonical(value: Any, sort_keys: bool = True) -> str:
    """JSON without spaces, ASCII only."""
    return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=True)
