"""The rows of a sparse message: chosen by a mask, checked when read, and where their values lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layout import Entry
from .errors import NamesError, RowsError, ShapeError
from .frame import running
from .parsing import short


class Rows:
    """The rows of the parameters that travel. They are numbered through; all tensors are int64 in host memory.

    entries: all of the flat buffer. chosen: those that travel.
    """

    def __init__(self, entries: Sequence[Entry], chosen: Sequence[Entry]) -> None:
        self._chosen = tuple(chosen)
        counts = torch.tensor([e.rows for e in chosen], dtype=torch.int64)
        self._counts = counts
        self._first = counts.cumsum(0) - counts
        self._lengths = torch.tensor([e.row_length for e in chosen], dtype=torch.int64).repeat_interleave(counts)
        self._starts = self._lengths.cumsum(0) - self._lengths
        firsts = running([e.rows for e in entries], last=True)
        self._mask_rows = firsts[-1]
        spans = [torch.arange(first, first + e.rows) for first, e in zip(firsts, entries, strict=False) if e in chosen]
        self._in_mask = torch.cat([torch.empty(0, dtype=torch.int64), *spans])

    def chosen(self, mask: Tensor | None) -> Tensor:
        """The rows that a mask over all rows of the flat buffer keeps."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (self._mask_rows,):
            found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"rows: {found}, wanted torch.bool ({self._mask_rows},): the plan is sparse")
        return mask.cpu()[self._in_mask].nonzero().squeeze(1)

    def parts(self, rows: Tensor) -> list[Entry]:
        """What of each parameter travels when these rows do."""
        counts = torch.bincount(self._part_of(rows), minlength=len(self._chosen)).tolist()
        return [replace(e, shape=(n, *e.shape[1:])) for e, n in zip(self._chosen, counts, strict=True)]

    def indices(self, rows: Tensor) -> Tensor:
        """int32: each row's number in its own parameter."""
        return (rows - self._first[self._part_of(rows)]).int()

    def positions(self, rows: Tensor) -> Tensor:
        """int64: where the values of these rows lie among the values of all rows."""
        lengths = self._lengths[rows]
        within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        return self._starts[rows].repeat_interleave(lengths) + within

    def declared(self, tensors: Mapping[str, Any]) -> list[Entry]:
        """What of each parameter travels, as a header says; only these shapes are looked at."""
        parts = []
        for e in self._chosen:
            name = f"{e.name}.rows"
            info = tensors.get(name)
            if info is None:
                raise NamesError(name, "missing")
            shape = info.get("shape") if isinstance(info, dict) else None
            if not (isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and 0 <= shape[0] <= e.rows):
                raise ShapeError(f"{name}.shape", f"{short(shape)}, wanted at most [{e.rows}]")
            parts.append(replace(e, shape=(shape[0], *e.shape[1:])))
        return parts

    def read(self, indices: Tensor, parts: Sequence[Entry]) -> Tensor:
        """The rows that a message's indices name. Raises RowsError unless they ascend inside each parameter."""
        part_of = torch.arange(len(parts)).repeat_interleave(torch.tensor([p.rows for p in parts], dtype=torch.int64))
        own = indices.cpu().long()
        rows = own + self._first[part_of]
        wrong = (own < 0) | (own >= self._counts[part_of])
        wrong[1:] |= rows[1:] <= rows[:-1]
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            name = parts[int(part_of[at])].name
            raise RowsError(f"{name}.rows", f"{int(own[at])}, wanted ascending rows from 0 to below its count")
        return rows

    def _part_of(self, rows: Tensor) -> Tensor:
        return torch.bucketize(rows, self._first + self._counts, right=True)
