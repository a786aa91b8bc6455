"""Frame: where everything lies in messages that carry parts of these shapes; writes and checks one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  the schemas must exist before a body is called
from .._backend import runs_cpp
from .._dispatch import run
from ..layout import Entry, row_layout
from .digest import crc32c, digest
from .errors import ChecksumError, NotFiniteError, RangeError, WireError
from .format import BLOCK, DTYPES, LARGEST_SCALE, LEVELS, SCALE, Message, payloads_of, scales_of
from .header import Agreed, Header


class Frame:
    """The bytes of one kind of message. Attributes: ``parts`` (of :func:`payloads_of`), ``numel`` values, ``nbytes``,
    ``header``, ``payloads``."""

    def __init__(self, parts: Sequence[Entry], agreed: Agreed) -> None:
        self.parts, self.agreed, self.numel = tuple(parts), agreed, sum(p.numel for p in parts)
        self.payloads = payloads_of(parts, agreed.dtype, agreed.sparse)
        self.header = Header(self.payloads, agreed, crc32c)
        self.nbytes = self.header.nbytes + self.header.data_nbytes
        self._indices = slice(0, 4 * sum(p.rows for p in parts) if agreed.sparse else 0)
        scales = 4 * sum(scales_of(p, agreed.dtype) for p in parts)
        self._scales = slice(self._indices.stop, self._indices.stop + scales)
        ranges = [[p.start, p.stop, p.dtype.kind] for p in self.payloads]
        self._ranges = torch.tensor(ranges, dtype=torch.int64).view(-1, 3)
        self._stored = DTYPES[agreed.dtype].torch

    def table(self) -> Tensor:
        """The table for the parts one after the other."""
        return table_of(self.parts, self.agreed.dtype)

    @cached_property
    def _constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """What csrc/wire_message.cpp knows: payloads, the header's bytes with the start of the sealed text, numbers."""
        at = [self.header.places[name].start for name in ("round", "num_samples", "crc32c", "seal")]
        base = self.header.places["base"].start if "base" in self.header.places else -1
        lines = _lines(self.parts, self.agreed.dtype, [0] * len(self.parts))
        first_lines = running([len(of_part) for of_part in lines], last=True)
        numbers = [list(DTYPES).index(self.agreed.dtype), self.header.nbytes, self._scales.stop, *at, base]
        header = bytearray(self.header.template + self.header.seal_start.encode("ascii"))
        return self._ranges, torch.frombuffer(header, dtype=torch.uint8), torch.tensor([*numbers, *first_lines])

    def typed(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """The values and the scales (none unless int8 or int4) in the data of a message."""
        return payload[self._scales.stop :].view(self._stored), payload[self._scales].view(torch.float32)

    def indices(self, payload: Tensor) -> Tensor:
        """int32: the rows that a sparse message carries, part by part."""
        return payload[self._indices].view(torch.int32)

    def write(
        self, data: Tensor, table: Tensor, message: Message, base: int, out: Tensor, indices: Tensor | None = None
    ) -> int | None:
        """Fill ``out``, uint8 (nbytes,) in host memory, with the values of ``data``.

        Returns None, or the index of the first payload that holds a value which is not finite: ``out`` is then not
        defined.
        """
        if runs_cpp(data) and not self.agreed.sparse:
            bad = torch.ops.fibecfed.wire_write_.default(data, table, *self._constants, *message, base, out)
            return None if bad < 0 else bad
        payload = out[self.header.nbytes :]
        staged = payload if data.is_cpu else torch.empty_like(payload, device=data.device)
        run("wire_pack_", data, data, table, *self.typed(staged))
        if staged is not payload:
            payload.copy_(staged)  # returns when the bytes are there: the checksums read them
        if indices is not None:
            self.indices(payload).copy_(indices)
        checksums, found = digest(payload, self._ranges)
        if any(found):
            return found.index(True)
        header = bytearray(self.header.write(message, checksums, base))
        out[: self.header.nbytes] = torch.frombuffer(header, dtype=torch.uint8)
        return None

    def read_ours(
        self, raw: Tensor, table: Tensor, round: int | None, base: int, target: Tensor, weight: float = 0.0
    ) -> Message | None:
        """Check ``raw`` and decode it into ``target`` in one pass, if it is a message as :meth:`write` writes it and
        C++ runs here; else None, and nothing is written: :meth:`check` finds what is wrong, or only in other words.

        target: float32, the values, or empty for none; float64: target += weight · values, where a weight below 0
        stands for the message's sample count.
        """
        if self.agreed.sparse or not runs_cpp(target) or raw.numel() != self.nbytes:
            return None
        wanted = -1 if round is None else round
        found = torch.ops.fibecfed.wire_read_.default(raw, table, *self._constants, wanted, base, weight, target)
        return Message(*found[1:]) if found[0] else None

    def check(self, header: dict[str, Any], payload: Tensor, base: int) -> Message:
        """What a parsed header says, after every check of it and of the data."""
        message, declared = self.header.read(header, len(payload), base)
        checksums, bad = digest(payload, self._ranges)
        for p, found, wanted in zip(self.payloads, checksums, declared, strict=True):
            if found != wanted:
                raise ChecksumError(p.name, f"CRC32C {found:08x}, the header says {wanted:08x}")
        if any(bad):
            wrong = self.payloads[bad.index(True)]
            more = f", or a scale of at least {LARGEST_SCALE:g}" if wrong.dtype == SCALE else ""
            raise NotFiniteError(wrong.name, f"holds an infinite value or NaN{more}")
        return message

    def unpack(self, payload: Tensor) -> dict[str, Tensor]:
        """The tensors in the data of a message, views of it."""
        return {p.name: payload[p.start : p.stop].view(p.dtype.torch).view(p.shape) for p in self.payloads}

    def refusal(self, bad: int, data: Tensor, offsets: Sequence[int]) -> WireError:
        """Why a payload cannot be sent; part i of what is sent begins at ``data[offsets[i]]``."""
        name, names = self.payloads[bad].name, [p.name for p in self.parts]
        index = names.index(name if name in names else name.removesuffix(".scale"))
        values = data[offsets[index] : offsets[index] + self.parts[index].numel]
        if not bool(values.isfinite().all()):
            whose = "its difference to the base, with the residual, " if self.agreed.based else ""
            return NotFiniteError(names[index], f"{whose}holds an infinite value or NaN")
        most, dtype = values.abs().max().item(), self.agreed.dtype
        largest = LEVELS[dtype] * LARGEST_SCALE if dtype in LEVELS else torch.finfo(self._stored).max
        problem = f"magnitude {most:g} does not fit {dtype}, whose largest is {largest:g}"
        return RangeError(names[index], problem)


def running(sizes: Sequence[int], last: bool = False) -> list[int]:
    """Where each of several things begins that follow one another; with ``last`` also where the last one ends."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts if last else starts[:-1]


def table_of(parts: Sequence[Entry], dtype: str, offsets: Sequence[int] | None = None) -> Tensor:
    """Where values are, int64 (lines, 5): offset in a float32 buffer, offset among the values of a message, first row
    of its scales, rows, row length.

    In the buffer part i begins at ``offsets[i]``; None: the parts lie one after the other. In int4 a row is a block of
    64 values, and every parameter starts at an even value: at a byte.
    """
    starts = running([p.numel for p in parts]) if offsets is None else offsets
    return torch.cat([torch.empty(0, 5, dtype=torch.int64), *_lines(parts, dtype, starts)])


def _lines(parts: Sequence[Entry], dtype: str, starts: Sequence[int]) -> list[Tensor]:
    """The table, part by part."""
    found, value, row, four = [], 0, 0, dtype == "int4"
    for part, start in zip(parts, starts, strict=True):
        tail = part.numel % BLOCK
        shapes = [(part.numel // BLOCK, BLOCK)] + [(1, tail)] * (tail > 0) if four else [part.shape]
        offsets = running([math.prod(shape) for shape in shapes])
        lines = row_layout([Entry("", shape, at, None) for shape, at in zip(shapes, offsets, strict=True)])
        offset, first, rows, length = lines.unbind(1)
        found.append(torch.stack([offset + start, offset + value, first + row, rows, length], 1))
        value += part.numel + (part.numel % 2 if four else 0)
        row += scales_of(part, "int4") if four else part.rows
    return found
