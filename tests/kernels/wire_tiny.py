"""The tiny adapter of tests/attacks/writer.py as the library sees it, and what must hold for any bytes sent to it."""

from __future__ import annotations

import json
import math

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from torch import Tensor

from fibecfed_kernels import Entry, Message, WireError, WirePlan
from tests.attacks import writer

from .wire_tools import Flat, values_of

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}


def tiny_flat() -> Flat:
    """Its flat buffer, with the values that the writer sends."""
    entries, offset = [], 0
    for name, layer, shape in writer.ENTRIES:
        entries.append(Entry(name, shape, offset, layer))
        offset += math.prod(shape)
    data = torch.tensor([writer.value(k) for k in range(offset)], dtype=torch.float32)
    return Flat(data, tuple(entries), writer.IDENTITY)


def tiny_plan(dtype: str, layers: tuple[int, ...] = (1,)) -> WirePlan:
    return WirePlan(tiny_flat(), layers, dtype)  # type: ignore[arg-type]


def decoded(message: bytes) -> tuple[Message, dict[str, Tensor]]:
    """What a message says, its tensors by the header's own offsets, with no check: for messages that were accepted."""
    end = 8 + int.from_bytes(message[:8], "little")
    header, data = json.loads(message[8:end]), message[end:]
    metadata = header.pop("__metadata__")
    found = {}
    for name, info in header.items():
        start, stop = info["data_offsets"]
        found[name] = torch.frombuffer(bytearray(data[start:stop]), dtype=TORCH[info["dtype"]]).view(info["shape"])
    return Message(int(metadata["round"]), int(metadata["num_samples"])), found


def is_safetensors(message: bytes) -> bool:
    try:
        safetensors_load(message)
    except SafetensorError:
        return False
    return True


class Receiver:
    """One plan, and a buffer that messages are loaded into."""

    def __init__(self, dtype: str, layers: tuple[int, ...] = (1,)) -> None:
        self.dtype, self.plan, self.into = dtype, tiny_plan(dtype, layers), tiny_flat()
        self.good = writer.file(*writer.parts(dtype, layers))

    def check(self, message: bytes) -> WireError | None:
        """Send ``message`` to every door, and return the refusal, None if it was accepted.

        Either each door gives the same WireError, and nothing was written; or the bytes are a safetensors file, and
        each door gives the values that it holds, all finite. Otherwise this is an AssertionError; an error that is none
        of the wire's own is not caught.
        """
        plan, data = self.plan, self.into.data.fill_(0.5)
        sum = torch.zeros(plan.numel, dtype=torch.float64)
        refusals = []
        for door in (plan.read, plan.unpack, lambda m: plan.load(m, self.into), lambda m: plan.add_(sum, m, 1.0)):
            try:
                door(message)
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
        wanted = values_of(tensors, plan)
        assert wanted.isfinite().all(), "accepted, though a value is not finite"
        assert plan.read(message) == said
        assert torch.equal(plan.gather(self.into), wanted), "load gives other values than the bytes"
        assert torch.equal(sum.float(), wanted), "add_ gives other values than the bytes"
        unpacked = plan.unpack(message)
        assert all(torch.equal(unpacked[name], tensor) for name, tensor in tensors.items())
