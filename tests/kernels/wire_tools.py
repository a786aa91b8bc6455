"""What the tests of the wire share: a tiny flat adapter, and a way to write messages that a sender should not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fibecfed_kernels import Entry, WirePlan
from fibecfed_kernels.wire.digest import crc32c

DTYPES = ("float32", "bfloat16", "float16", "int8", "int4")
Shapes = Sequence[tuple[int | None, tuple[int, ...]]]
SHAPES: Shapes = (
    (0, (4, 31)),
    (0, (31, 4)),
    (1, (8, 1000)),
    (1, (257, 8)),
    (2, (1, 1)),
    (2, (3, 5)),
    (2, (3, 0)),
    (None, (2, 7)),
    (None, (2,)),
)


@dataclass
class Flat:
    """The least that is a FlatBuffers."""

    data: Tensor
    entries: tuple[Entry, ...]
    identity: Mapping[str, str] = field(default_factory=lambda: {"model": "tiny", "adapter": "r=4 α=8"})


def make_flat(shapes: Shapes = SHAPES, seed: int = 0, spread: float = 1.0) -> Flat:
    """Random values over some orders of magnitude, one row in eight all zero."""
    entries, offset = [], 0
    for i, (layer, shape) in enumerate(shapes):
        entries.append(Entry(f"block.{layer}.{i}.weight" if layer is not None else f"head.{i}", shape, offset, layer))
        offset += entries[-1].numel
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(offset, generator=generator) * 10 ** (
        spread * torch.randn(offset, generator=generator).clamp(-2, 2)
    )
    for entry in entries:
        if entry.numel:
            data[entry.offset : entry.offset + entry.numel].view(entry.rows, -1)[7::8] = 0
    return Flat(data, tuple(entries))


def values_of(tensors: Mapping[str, Tensor], plan: WirePlan) -> Tensor:
    """The values that an unpacked message stands for, float32, in the plan's order."""
    parts = [coded(tensors, part.name, plan.dtype, part.numel) for part in plan._frame.parts]
    return torch.cat(parts) if parts else torch.empty(0)


def coded(tensors: Mapping[str, Tensor], name: str, dtype: str, numel: int) -> Tensor:
    """The ``numel`` values that one tensor of a message carries, float32."""
    value = tensors[name].float()
    if dtype == "int4":
        both, scale = tensors[name].int(), tensors[f"{name}.scale"]
        value = torch.stack([both & 15, both >> 4], 1).flatten()
        value = ((value ^ 8) - 8).float()[:numel] * scale.repeat_interleave(64)[:numel]
    elif dtype == "int8":
        scale = tensors[f"{name}.scale"]
        value = value.view(len(scale), -1) * scale[:, None] if value.numel() else value
    return value.flatten()


def split(message: Tensor) -> tuple[dict[str, Any], bytes]:
    """The header (a dict) and the data of a message."""
    raw = message.numpy().tobytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def join(header: dict[str, Any] | bytes, data: bytes, reseal: bool = True, declared: int | None = None) -> Tensor:
    """A message with any header; ``reseal`` makes its checksums right, as an attacker would."""
    if isinstance(header, dict):
        if reseal:
            header = resealed(header, data)
        header = json.dumps(header).encode()
        header += b" " * (-len(header) % 8)
    start = (len(header) if declared is None else declared).to_bytes(8, "little")
    return torch.frombuffer(bytearray(start + header + data), dtype=torch.uint8)


def resealed(header: dict[str, Any], data: bytes) -> dict[str, Any]:
    metadata = dict(header["__metadata__"])
    spans = [info["data_offsets"] for name, info in header.items() if name != "__metadata__"]
    metadata["crc32c"] = "".join(f"{crc32c(data[a:b]):08x}" for a, b in sorted(spans))
    keys = ("version", "schema", "round", "num_samples", "crc32c", "base")
    sealed = " ".join(metadata[key] for key in keys if key in metadata)
    metadata["seal"] = f"{crc32c(sealed.encode()):08x}"
    return {**header, "__metadata__": metadata}


def edited(message: Tensor, edit: Callable[[dict[str, Any]], None], reseal: bool = True) -> Tensor:
    """The message with its header changed by ``edit``."""
    header, data = split(message)
    edit(header)
    return join(header, data, reseal)
