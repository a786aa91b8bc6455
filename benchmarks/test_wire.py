"""Packing and loading an adapter beside safetensors itself, which checks nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fibecfed_kernels import Entry, WirePlan, aggregate

from .test_update import SHAPES, entries


@dataclass
class Adapter:
    """A flat adapter of RoBERTa-large, r = 8."""

    entries: tuple[Entry, ...] = field(default_factory=lambda: tuple(entries()))
    data: Tensor = field(default_factory=lambda: torch.randn(sum(a * b for a, b in SHAPES)))
    identity: Mapping[str, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        return {e.name: self.data[e.offset : e.offset + e.numel].view(e.shape) for e in self.entries}


GROUP = "wire, RoBERTa-large r=8, all layers, 3.15 MB float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_pack(benchmark: Any, dtype: Any) -> None:
    flat = Adapter()
    plan = WirePlan(flat, range(24), dtype)
    out = plan.pack(flat, round=1, num_samples=1)
    benchmark.group = f"{GROUP}: pack (checksums included)"
    benchmark(plan.pack, flat, round=1, num_samples=1, out=out)


def test_pack_safetensors(benchmark: Any) -> None:
    tensors = Adapter().tensors()
    benchmark.group = f"{GROUP}: pack (checksums included)"
    benchmark(safetensors.torch.save, tensors)


def test_load(benchmark: Any) -> None:
    flat = Adapter()
    plan = WirePlan(flat, range(24))
    message = plan.pack(flat, round=1, num_samples=1)
    benchmark.group = f"{GROUP}: load (every check included)"
    benchmark(plan.load, message, flat)


def test_load_safetensors(benchmark: Any) -> None:
    flat = Adapter()
    message, views = safetensors.torch.save(flat.tensors()), flat.tensors()

    def load() -> None:
        for name, tensor in safetensors.torch.load(message).items():
            views[name].copy_(tensor)

    benchmark.group = f"{GROUP}: load (every check included)"
    benchmark(load)


def test_aggregate_ten(benchmark: Any) -> None:
    flat = Adapter()
    plan = WirePlan(flat, range(24))
    messages = [plan.pack(flat, round=1, num_samples=i + 1) for i in range(10)]
    benchmark.group = f"{GROUP}: mean of ten messages"
    benchmark(aggregate, plan, messages, range(1, 11))
