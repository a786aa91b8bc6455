"""A second writer of the wire format, by the letter of kernels/wire/FORMAT.md, without the library or torch.

What it writes for a tiny adapter is what golden messages and attacks are compared with and made from.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

IDENTITY = {"model": "tiny", "adapter": "r=2 α=4"}
Entries = tuple[tuple[str, int | None, tuple[int, ...]], ...]  # name, block (None: the head), shape
ENTRIES: Entries = (
    ("block.0.lora_A.weight", 0, (2, 3)),
    ("block.0.lora_B.weight", 0, (3, 2)),
    ("block.1.lora_A.weight", 1, (2, 3)),
    ("block.1.lora_B.weight", 1, (3, 2)),
    ("head.bias", None, (2,)),
    ("head.gain", None, ()),
)
WIDE: Entries = (*ENTRIES, ("head.wide", None, (3, 45)))  # two whole blocks of int4, across rows, and a part of one
ROWS = (0, 1, 3, 6, 7, 9, 12, 13, 15)  # that sparse messages send, counted through WIDE: none of head.bias
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "int4": "U8"}
BLOCK = 64  # values of one scale in int4
Parts = tuple[dict[str, Any], bytes]  # a header and the data after it


@dataclass(frozen=True)
class Kind:
    """What sender and receiver agree on, but for the layers."""

    dtype: str = "float32"
    delta: bool = False
    sparse: bool = False
    entries: Entries = ENTRIES

    @property
    def based(self) -> bool:
        return self.delta or self.sparse

    @property
    def version(self) -> str:
        return "1.1" if self.based or self.dtype == "int4" else "1.0"

    @property
    def name(self) -> str:
        return "-".join((self.dtype, *["delta"] * self.delta, *["sparse"] * self.sparse))


FLOAT32, BFLOAT16, FLOAT16, INT8 = OF_1_0 = tuple(Kind(dtype) for dtype in ("float32", "bfloat16", "float16", "int8"))
INT4, INT8_DELTA, FLOAT32_SPARSE, INT4_DELTA_SPARSE = OF_1_1 = (
    Kind("int4", entries=WIDE),
    Kind("int8", delta=True, entries=WIDE),
    Kind("float32", sparse=True, entries=WIDE),
    Kind("int4", delta=True, sparse=True, entries=WIDE),
)
KINDS = (*OF_1_0, *OF_1_1)


class Whole(NamedTuple):
    """A tensor that travels: ``values`` of it and of its base, ``first`` of its rows among those of all tensors."""

    name: str
    shape: tuple[int, ...]
    values: list[float]
    base: list[float]
    first: int


class Sent(NamedTuple):
    """What is coded of a tensor: ``values`` of this shape, which are its rows ``rows``."""

    name: str
    shape: tuple[int, ...]
    values: list[float]
    rows: list[int]


class Payload(NamedTuple):
    """A tensor of a message: its dtype as safetensors has it, and its bytes."""

    name: str
    code: str
    shape: tuple[int, ...]
    raw: bytes


def float32(x: float) -> float:
    """x rounded to float32; one operation on float32 values in Python's float64, so rounded, is float32's own."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def value(k: int) -> float:
    """Value k of the adapter's buffer: (−1)^k (2k + 1)/3 · 2^((7k mod 33) − 20) in float32, every eleventh zero.

    Within the range of every dtype, the smallest subnormal in float16; the thirds make every dtype round.
    """
    sign = -1 if k % 2 else 1
    return 0.0 if k % 11 == 5 else float32(sign * (2 * k + 1) / 3 * 2.0 ** (7 * k % 33 - 20))


def base_value(k: int) -> float:
    """Value k of the base that both ends hold: the adapter's own next value, so that differences round too."""
    return value(k + 1)


def tensors(kind: Kind, layers: Iterable[int]) -> list[Whole]:
    """What travels, in order."""
    found, start, first = [], 0, 0
    for name, layer, shape in kind.entries:
        stop = start + math.prod(shape)
        if layer is None or layer in layers:
            places = range(start, stop)
            found.append(Whole(name, shape, [value(k) for k in places], [base_value(k) for k in places], first))
        start, first = stop, first + (shape[0] if shape else 1)
    return found


def base(kind: Kind, layers: Iterable[int]) -> list[float]:
    """The base's values, one tensor after the other."""
    return [x for tensor in tensors(kind, layers) for x in tensor.base]


def chosen(kind: Kind, tensor: Whole, rows: Collection[int]) -> Sent:
    """The differences, if it is these that are sent, of the rows that are sent."""
    name, shape, values, base, first = tensor
    if kind.delta:
        values = [float32(x - b) for x, b in zip(values, base, strict=True)]
    count = shape[0] if shape else 1
    if not kind.sparse:
        return Sent(name, shape, values, list(range(count)))
    own, length = [r for r in range(count) if first + r in rows], len(values) // count
    return Sent(name, (len(own), *shape[1:]), [x for r in own for x in values[r * length : (r + 1) * length]], own)


def encoded(x: float, dtype: str) -> bytes:
    """One value of a float dtype, rounded to nearest, ties to even."""
    if dtype == "bfloat16":
        (bits,) = struct.unpack("<I", struct.pack("<f", x))
        return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return struct.pack("<e" if dtype == "float16" else "<f", x)


def quantized(values: list[float], length: int, levels: int) -> tuple[list[float], list[int]]:
    """Of each ``length`` values the scale, M/levels, and all q = round(x · (levels/M)), ties to even."""
    scales, numbers = [], []
    for start in range(0, len(values), length):
        line = values[start : start + length]
        most = max(map(abs, line))
        sent = most >= levels * 2.0**-126
        scales.append(float32(most / levels) if sent else 0.0)
        numbers += [round(float32(x * float32(levels / most))) if sent else 0 for x in line]
    return scales, numbers


def half_bytes(numbers: list[int]) -> bytes:
    """Two numbers a byte, in two's complement, the first one in the low half."""
    even = numbers + [0] * (len(numbers) % 2)
    return bytes(low & 15 | (high & 15) << 4 for low, high in zip(even[::2], even[1::2], strict=True))


def coded(tensor: Sent, dtype: str) -> list[Payload]:
    """The scales, if there are any, and the values of one tensor."""
    name, shape, values, _ = tensor
    if dtype not in ("int8", "int4"):
        return [Payload(name, CODES[dtype], shape, b"".join(encoded(x, dtype) for x in values))]
    if dtype == "int8":
        scales, q = quantized(values, math.prod(shape[1:]), 127)
        numbers = Payload(name, "I8", shape, struct.pack(f"<{len(q)}b", *q))
    else:
        scales, q = quantized(values, BLOCK, 7)
        numbers = Payload(name, "U8", (-(-len(q) // 2),), half_bytes(q))
    return [Payload(f"{name}.scale", "F32", (len(scales),), struct.pack(f"<{len(scales)}f", *scales)), numbers]


def numbered(name: str, rows: list[int]) -> Payload:
    """The rows of a tensor."""
    return Payload(f"{name}.rows", "I32", (len(rows),), struct.pack(f"<{len(rows)}i", *rows))


def payloads(kind: Kind, layers: Iterable[int], rows: Collection[int] = ROWS) -> list[Payload]:
    """All of a message, in the order of the bytes: rows, then scales, then values."""
    sent = [chosen(kind, tensor, rows) for tensor in tensors(kind, layers)]
    of_tensors = [coded(tensor, kind.dtype) for tensor in sent]
    scales, values = [p for of in of_tensors for p in of[:-1]], [of[-1] for of in of_tensors]
    if not kind.sparse:
        return scales + values
    return [numbered(tensor.name, tensor.rows) for tensor in sent] + scales + values


def remainder(crc: int) -> int:
    """One byte of CRC32C (RFC 3720), bit by bit."""
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


REMAINDERS = [remainder(byte) for byte in range(256)]


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ REMAINDERS[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def sealed(header: dict[str, Any], data: bytes) -> dict[str, Any]:
    """The header with checksums and seal that fit the data."""
    metadata = {key: text for key, text in header["__metadata__"].items() if key not in ("crc32c", "base", "seal")}
    spans = sorted(info["data_offsets"] for name, info in header.items() if name != "__metadata__")
    metadata["crc32c"] = "".join(f"{crc32c(data[start:stop]):08x}" for start, stop in spans)
    keys = ["version", "schema", "round", "num_samples", "crc32c"]
    if "base" in header["__metadata__"]:
        metadata["base"] = header["__metadata__"]["base"]
        keys.append("base")
    metadata["seal"] = f"{crc32c(' '.join(metadata[key] for key in keys).encode()):08x}"
    return {**header, "__metadata__": metadata}


def canonical(value: Any, sort_keys: bool = False) -> str:
    """JSON without spaces, everything outside ASCII escaped."""
    return json.dumps(value, separators=(",", ":"), sort_keys=sort_keys)


def laid_out(metadata: dict[str, Any], of: Iterable[Payload]) -> Parts:
    """The header and the data of these payloads, one after the other, with checksums and seal."""
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for name, code, shape, raw in of:
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return sealed(header, data), data


def parts(
    kind: Kind = FLOAT32,
    layers: Iterable[int] = (1,),
    round: int = 6,
    num_samples: int = 77,
    version: str | None = None,
    identity: dict[str, str] = IDENTITY,
    rows: Collection[int] = ROWS,
) -> Parts:
    """The header and the data of the tiny adapter's message, all as it should be."""
    layers = sorted(layers)
    described = [[tensor.name, list(tensor.shape)] for tensor in tensors(kind, layers)]
    relation = {name: True for name, holds in (("delta", kind.delta), ("sparse", kind.sparse)) if holds}
    agreed = {"dtype": kind.dtype, "identity": identity, "layers": layers, "tensors": described, **relation}
    metadata = {
        "dtype": kind.dtype,
        "format": "fibecfed",
        "layers": canonical(layers),
        "schema": hashlib.sha256(canonical(agreed, sort_keys=True).encode()).hexdigest(),
        "version": version or kind.version,
        "round": f"{round:016d}",
        "num_samples": f"{num_samples:016d}",
    }
    if kind.based:
        values = base(kind, layers)
        metadata["base"] = f"{crc32c(struct.pack(f'<{len(values)}f', *values)):08x}"
    return laid_out(metadata, payloads(kind, layers, rows))


def file(header: dict[str, Any] | bytes, data: bytes = b"", declared: int | None = None) -> bytes:
    """A message of any header (bytes: as they are) and data; ``declared`` is the header's length if not its own."""
    if isinstance(header, dict):
        header = canonical(header).encode()
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header) if declared is None else declared) + header + data
