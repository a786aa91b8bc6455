"""The adapters that the suites of update and wire are about: LoRA on query and value of every block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fibecfed_kernels import Entry


@dataclass(frozen=True)
class Model:
    """``layers`` blocks of width ``d`` with rank ``r`` on query and value: 4 tensors a block."""

    name: str
    layers: int
    d: int
    r: int

    @property
    def entries(self) -> tuple[Entry, ...]:
        found: list[Entry] = []
        for i in range(4 * self.layers):
            shape = (self.r, self.d) if i % 2 == 0 else (self.d, self.r)
            found.append(Entry(f"p{i}", shape, i * self.d * self.r, i // 4))
        return tuple(found)

    def __str__(self) -> str:
        return f"{self.name} r={self.r}"


MODELS = (Model("RoBERTa-large", 24, 1024, 8), Model("LLaMA-7B", 32, 4096, 8))
LITTLE = Model("little", 2, 16, 8)  # what calls are rehearsed on


@dataclass
class Adapter:
    """A flat adapter with random values."""

    model: Model
    device: torch.device
    entries: tuple[Entry, ...] = field(init=False)
    data: Tensor = field(init=False)
    identity: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.entries = self.model.entries
        self.data = torch.randn(sum(e.numel for e in self.entries)).to(self.device)

    @property
    def rows(self) -> int:
        return sum(e.rows for e in self.entries)

    def tensors(self, of: Tensor | None = None) -> dict[str, Tensor]:
        """The parameters by name, views of the buffer (or of another one of its size)."""
        values = self.data if of is None else of
        return {e.name: values[e.offset : e.offset + e.numel].view(e.shape) for e in self.entries}
