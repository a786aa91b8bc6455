"""The tiny adapter of tests/attacks/writer.py as the library sees it."""

from __future__ import annotations

import math

import torch

from fibecfed_kernels import Entry, WirePlan
from tests.attacks import writer

from .wire_tools import Flat


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
