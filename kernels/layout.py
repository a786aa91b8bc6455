"""How parameters lie in one flat buffer: entries (parameters), rows (neurons), lines (what one kernel program takes).

A *row* of a parameter is what one output neuron owns: ``p[j]``. A matrix (m, n) has m rows of n values, a vector (m,)
has m rows of one value, a scalar one row of one value. Row j of a LoRA B is output neuron j, row i of a LoRA A is rank
component i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LINE_NUMEL = 1024  # values in a line: 28 KiB of AdamW traffic, enough to fill a program and few enough to balance


@dataclass(frozen=True)
class Entry:
    """One parameter in the flat buffer: its name, shape, offset (in values) and transformer block (None: the head)."""

    name: str
    shape: tuple[int, ...]
    offset: int
    layer: int | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_length(self) -> int:
        return math.prod(self.shape[1:])


class FlatBuffers(Protocol):
    """What the wire needs of a flat adapter: the buffer, its entries, and what identifies model and adapter.

    Where there are methods ``check()`` and ``changed()``, as :class:`fibecfed.FlatAdapter` has them, one is called
    before values are read or written, and raises when the model no longer uses the buffer, the other after they were
    written.
    """

    @property
    def data(self) -> Tensor: ...

    @property
    def entries(self) -> tuple[Entry, ...]: ...

    @property
    def identity(self) -> Mapping[str, str]: ...


def row_layout(entries: Sequence[Entry], device: torch.device | str = "cpu", line_numel: int = LINE_NUMEL) -> Tensor:
    """Cut the rows of ``entries`` into lines of about ``line_numel`` values.

    Returns an int64 tensor (lines, 4) with columns offset (values), first row, rows, row length (values). A row is
    never cut: a row longer than ``line_numel`` is a line of its own. Lines are in the order of the buffer and cover it.

    Raises ValueError when the entries do not follow one another without holes.
    """
    lines: list[tuple[int, int, int, int]] = []
    offset = first_row = 0
    for entry in entries:
        if entry.offset != offset:
            raise ValueError(
                f"entry {entry.name!r} starts at {entry.offset}, wanted {offset}: entries must be contiguous"
            )
        step = max(1, line_numel // max(1, entry.row_length))
        for row in range(0, entry.rows, step):
            rows = min(step, entry.rows - row)
            lines.append((entry.offset + row * entry.row_length, first_row + row, rows, entry.row_length))
        offset += entry.numel
        first_row += entry.rows
    return torch.tensor(lines, dtype=torch.int64).reshape(-1, 4).to(device)


def merged_spans(entries: Sequence[Entry]) -> tuple[tuple[int, int], ...]:
    """(start, stop) in values of what ``entries`` cover of the buffer, neighbours as one."""
    slices: list[tuple[int, int]] = []
    for e in entries:
        if e.numel and slices and slices[-1][1] == e.offset:
            slices[-1] = (slices[-1][0], e.offset + e.numel)
        elif e.numel:
            slices.append((e.offset, e.offset + e.numel))
    return tuple(slices)
