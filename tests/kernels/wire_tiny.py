"""The tiny adapter of tests/attacks/writer.py as the library sees it, and what must hold for any bytes sent to it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from torch import Tensor

from fibecfed_kernels import Entry, Message, WireError, WirePlan
from tests.attacks import writer
from tests.attacks.writer import FLOAT32, Kind

from .wire_tools import Flat, coded

TORCH = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
}


def tiny_flat(entries: writer.Entries = writer.ENTRIES) -> Flat:
    """Its flat buffer, with the values that the writer sends."""
    found, offset = [], 0
    for name, layer, shape in entries:
        found.append(Entry(name, shape, offset, layer))
        offset += math.prod(shape)
    data = torch.tensor([writer.value(k) for k in range(offset)], dtype=torch.float32)
    return Flat(data, tuple(found), writer.IDENTITY)


def tiny_plan(kind: Kind = FLOAT32, layers: tuple[int, ...] = (1,)) -> WirePlan:
    flat = tiny_flat(kind.entries)
    return WirePlan(flat, layers, kind.dtype, delta=kind.delta, sparse=kind.sparse)  # type: ignore[arg-type]


def tiny_base(kind: Kind, layers: tuple[int, ...] = (1,)) -> Tensor | None:
    """What a plan's methods take as ``base``."""
    return torch.tensor(writer.base(kind, layers), dtype=torch.float32) if kind.based else None


def packed(kind: Kind, layers: tuple[int, ...] = (1,)) -> bytes:
    """The library's own message, which is to be the second writer's."""
    flat = tiny_flat(kind.entries)
    mask = torch.tensor([row in writer.ROWS for row in range(sum(e.rows for e in flat.entries))])
    base, rows = tiny_base(kind, layers), mask if kind.sparse else None
    return bytes(tiny_plan(kind, layers).pack(flat, round=6, num_samples=77, base=base, rows=rows).numpy())


def decoded(message: bytes) -> tuple[Message, dict[str, Tensor]]:
    """What a message says, its tensors by the header's own offsets, with no check: for messages that were accepted."""
    end = 8 + int.from_bytes(message[:8], "little")
    header, data = json.loads(message[8:end]), message[end:]
    metadata = header.pop("__metadata__")
    found = {}
    for name, info in header.items():
        start, stop = info["data_offsets"]
        raw, dtype = bytearray(data[start:stop]), TORCH[info["dtype"]]
        flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        found[name] = flat.view(info["shape"])
    return Message(int(metadata["round"]), int(metadata["num_samples"])), found


def meant(tensors: Mapping[str, Tensor], kind: Kind, layers: tuple[int, ...] = (1,)) -> Tensor:
    """The values that the tensors of a message stand for, float32."""
    values = []
    for name, shape, _, own, _ in writer.tensors(kind, layers):
        count = shape[0] if shape else 1
        rows = tensors[f"{name}.rows"].long() if kind.sparse else torch.arange(count)
        base = torch.tensor(own, dtype=torch.float32).view(count, -1)
        sent = coded(tensors, name, kind.dtype, len(rows) * base.shape[1]).view(len(rows), base.shape[1])
        whole = base.clone()
        whole[rows] = base[rows] + sent if kind.delta else sent
        values.append(whole.flatten())
    return torch.cat(values)


def is_safetensors(message: bytes) -> bool:
    try:
        safetensors_load(message)
    except SafetensorError:
        return False
    return True


class Receiver:
    """One plan, and a buffer that messages are loaded into."""

    def __init__(self, kind: Kind, layers: tuple[int, ...] = (1,)) -> None:
        self.kind, self.layers = kind, layers
        self.plan, self.into, self.base = tiny_plan(kind, layers), tiny_flat(kind.entries), tiny_base(kind, layers)
        self.good = writer.file(*writer.parts(kind, layers))

    def check(self, message: bytes) -> WireError | None:
        """Send ``message`` to every door, and return the refusal, None if it was accepted.

        Either each door gives the same WireError, and nothing was written; or the bytes are a safetensors file, and
        each door gives the values that it holds, all finite. Otherwise this is an AssertionError; an error that is none
        of the wire's own is not caught.
        """
        plan, data, base = self.plan, self.into.data.fill_(0.5), self.base
        sum = torch.zeros(plan.numel, dtype=torch.float64)
        refusals = []
        doors = (
            lambda: plan.read(message, base=base),
            lambda: plan.unpack(message, base=base),
            lambda: plan.load(message, self.into, base=base),
            lambda: plan.add_(sum, message, 1.0, base=base),
        )
        for door in doors:
            try:
                door()
            except WireError as error:
                refusals.append(error)
        if not refusals:
            self._check_values(message, sum)
            return None
        assert len(refusals) == 4, f"taken at some doors: {refusals[0]!r}"
        assert len({(type(error), error.field) for error in refusals}) == 1, refusals
        assert data.eq(0.5).all(), f"loaded, though refused: {refusals[0]!r}"
        assert not sum.any(), f"added, though refused: {refusals[0]!r}"
        return refusals[0]

    def _check_values(self, message: bytes, sum: Tensor) -> None:
        plan, (said, tensors) = self.plan, decoded(message)
        assert is_safetensors(message), "accepted, though it is no safetensors file"
        wanted = meant(tensors, self.kind, self.layers)
        assert wanted.isfinite().all(), "accepted, though a value is not finite"
        assert plan.read(message, base=self.base) == said
        assert torch.equal(plan.gather(self.into), wanted), "load gives other values than the bytes"
        assert torch.equal(sum, wanted.double()), "add_ gives other values than the bytes"
        unpacked = plan.unpack(message, base=self.base)
        assert unpacked.keys() == tensors.keys()
        assert all(torch.equal(unpacked[name], tensor) for name, tensor in tensors.items())
