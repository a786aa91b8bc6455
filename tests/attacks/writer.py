"""A second writer of the wire format, by the letter of kernels/wire/FORMAT.md, without the library or torch.

What it writes for a tiny adapter is what golden messages and attacks are compared with and made from.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable
from typing import Any

IDENTITY = {"model": "tiny", "adapter": "r=2 α=4"}
ENTRIES: tuple[tuple[str, int | None, tuple[int, ...]], ...] = (  # name, block (None: the head), shape
    ("block.0.lora_A.weight", 0, (2, 3)),
    ("block.0.lora_B.weight", 0, (3, 2)),
    ("block.1.lora_A.weight", 1, (2, 3)),
    ("block.1.lora_B.weight", 1, (3, 2)),
    ("head.bias", None, (2,)),
    ("head.gain", None, ()),
)
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
Parts = tuple[dict[str, Any], bytes]  # a header and the data after it


def float32(x: float) -> float:
    """x rounded to float32; one operation on float32 values in Python's float64, so rounded, is float32's own."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def value(k: int) -> float:
    """Value k of the adapter's buffer: (−1)^k (2k + 1)/3 · 2^((7k mod 33) − 20) in float32, every eleventh zero.

    Within the range of every dtype, the smallest subnormal in float16; the thirds make every dtype round.
    """
    sign = -1 if k % 2 else 1
    return 0.0 if k % 11 == 5 else float32(sign * (2 * k + 1) / 3 * 2.0 ** (7 * k % 33 - 20))


def tensors(layers: Iterable[int]) -> list[tuple[str, tuple[int, ...], list[float]]]:
    """Name, shape and values of what travels, in order."""
    found, start = [], 0
    for name, layer, shape in ENTRIES:
        stop = start + math.prod(shape)
        if layer is None or layer in layers:
            found.append((name, shape, [value(k) for k in range(start, stop)]))
        start = stop
    return found


def encoded(x: float, dtype: str) -> bytes:
    """One value of a float dtype, rounded to nearest, ties to even."""
    if dtype == "bfloat16":
        (bits,) = struct.unpack("<I", struct.pack("<f", x))
        return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return struct.pack("<e" if dtype == "float16" else "<f", x)


def quantized(values: list[float], rows: int) -> tuple[list[float], list[int]]:
    """The scale of each row, M/127, and all q = round(x · (127/M)), ties to even."""
    length = len(values) // rows
    scales, numbers = [], []
    for r in range(rows):
        row = values[r * length : (r + 1) * length]
        most = max(map(abs, row))
        sent = most >= 127 * 2.0**-126
        scales.append(float32(most / 127) if sent else 0.0)
        numbers += [round(float32(x * float32(127 / most))) if sent else 0 for x in row]
    return scales, numbers


def payloads(dtype: str, layers: Iterable[int]) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Name, safetensors' dtype, shape and bytes of each tensor of a message, in the order of the bytes."""
    if dtype != "int8":
        return [(n, CODES[dtype], s, b"".join(encoded(x, dtype) for x in v)) for n, s, v in tensors(layers)]
    scales, numbers = [], []
    for name, shape, values in tensors(layers):
        rows = shape[0] if shape else 1
        scale, q = quantized(values, rows)
        scales.append((f"{name}.scale", "F32", (rows,), struct.pack(f"<{rows}f", *scale)))
        numbers.append((name, "I8", shape, struct.pack(f"<{len(q)}b", *q)))
    return scales + numbers


def crc32c(data: bytes) -> int:
    """CRC32C (RFC 3720), bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def sealed(header: dict[str, Any], data: bytes) -> dict[str, Any]:
    """The header with checksums and seal that fit the data."""
    metadata = {key: text for key, text in header["__metadata__"].items() if key not in ("crc32c", "seal")}
    spans = sorted(info["data_offsets"] for name, info in header.items() if name != "__metadata__")
    metadata["crc32c"] = "".join(f"{crc32c(data[start:stop]):08x}" for start, stop in spans)
    agreed = " ".join(metadata[key] for key in ("version", "schema", "round", "num_samples", "crc32c"))
    metadata["seal"] = f"{crc32c(agreed.encode()):08x}"
    return {**header, "__metadata__": metadata}


def canonical(value: Any) -> str:
    """JSON without spaces, everything outside ASCII escaped, keys as they come."""
    return json.dumps(value, separators=(",", ":"))


def parts(
    dtype: str = "float32",
    layers: Iterable[int] = (1,),
    round: int = 6,
    num_samples: int = 77,
    version: str = "1.0",
    identity: dict[str, str] = IDENTITY,
) -> Parts:
    """The header and the data of the tiny adapter's message, all as it should be."""
    layers = sorted(layers)
    described = [[name, list(shape)] for name, shape, _ in tensors(layers)]
    agreed = {"dtype": dtype, "identity": dict(sorted(identity.items())), "layers": layers, "tensors": described}
    metadata = {
        "dtype": dtype,
        "format": "fibecfed",
        "layers": canonical(layers),
        "schema": hashlib.sha256(canonical(agreed).encode()).hexdigest(),
        "version": version,
        "round": f"{round:016d}",
        "num_samples": f"{num_samples:016d}",
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for name, code, shape, raw in payloads(dtype, layers):
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return sealed(header, data), data


def file(header: dict[str, Any] | bytes, data: bytes = b"", declared: int | None = None) -> bytes:
    """A message of any header (bytes: as they are) and data; ``declared`` is the header's length if not its own."""
    if isinstance(header, dict):
        header = canonical(header).encode()
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header) if declared is None else declared) + header + data
