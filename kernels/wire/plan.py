"""WirePlan: what travels, where it lies in a message and in the flat buffer; packs, checks and loads messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .._dispatch import run
from ..layout import Entry, FlatBuffers, row_layout
from .arguments import (
    Buffer,
    bytes_of,
    check_entries,
    check_flat,
    check_values,
    checked_count,
    checked_weight,
    is_aligned,
    sorted_layers,
)
from .digest import crc32c, digest
from .errors import ChecksumError, NotFiniteError, RangeError, RoundError
from .format import ALIGNMENT, DTYPES, LENGTH_BYTES, Header, Message, fingerprint_of, payloads_of

WireDtype = Literal["float32", "bfloat16", "float16", "int8"]


class WirePlan:
    """How the chosen layers of a flat adapter travel: a safetensors file, laid out once, filled again and again.

    Args:
        flat: the adapter (:class:`fibecfed_kernels.FlatBuffers`); only its entries and identity are kept.
        layers: indices of the transformer blocks that travel, in any order. Entries without a block (the head) always
            do.
        dtype: of the values on the wire. ``"float32"`` is exact; ``"bfloat16"`` and ``"float16"`` round to nearest
            even; ``"int8"`` sends q = round(x / s) with one float32 scale s = max|row| / 127 a row (tensor ``name +
            ".scale"``), error at most s/2. Rows whose maximum is below 127·2⁻¹²⁶ ≈ 1.5e-36 are sent as zeros, scale 0.

    Attributes: ``names`` of the entries that travel, ``layers`` (sorted), ``dtype``, ``numel`` values, ``nbytes`` of a
    message, ``fingerprint`` (hex), ``slices`` of the flat buffer that travel: (start, stop) in values, merged.

    A plan never changes, so threads may share it. All methods raise TypeError or ValueError for arguments that do not
    fit, and the :class:`WireError` that says why for a message that is refused.
    """

    def __init__(
        self,
        flat: FlatBuffers,
        layers: Iterable[int],
        dtype: WireDtype = "float32",
    ) -> None:
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r}, wanted one of the names {', '.join(map(repr, DTYPES))}")
        check_flat(flat)
        self.dtype: WireDtype = dtype
        self._wire_dtype = DTYPES[dtype].torch
        self._entries, self._identity = tuple(flat.entries), dict(flat.identity)
        self._flat_numel = check_entries(self._entries, self._identity, dtype)
        self.layers = sorted_layers(layers, self._entries)
        self._data(flat)
        chosen = tuple(e for e in self._entries if e.layer is None or e.layer in self.layers)
        self.names = tuple(e.name for e in chosen)
        self.numel = sum(e.numel for e in chosen)
        self.slices = _merged(chosen)
        self.fingerprint = fingerprint_of(self._identity, chosen, self.layers, dtype)
        self._payloads = payloads_of(chosen, DTYPES[dtype])
        self._header = Header(self._payloads, self.fingerprint, dtype, self.layers, crc32c)
        self.nbytes = self._header.nbytes + self._header.data_nbytes
        self._scales_nbytes = 4 * sum(e.rows for e in chosen) if dtype == "int8" else 0
        ranges = [[p.start, p.stop, p.dtype.kind] for p in self._payloads]
        self._ranges = torch.tensor(ranges, dtype=torch.int64).view(-1, 3)
        self._tables = {torch.device("cpu"): _table(chosen)}  # a copy a device, made when first asked for

    def pack(self, flat: FlatBuffers, *, round: int, num_samples: int, out: Tensor | None = None) -> Tensor:
        """The message: a safetensors file as uint8 (nbytes,) in host memory, pinned when ``flat.data`` is on CUDA.

        The same values, round and count give the same bytes. ``out``, uint8 (nbytes,), contiguous, 8-byte aligned, host
        memory, is filled instead of a new tensor; what it holds after an error is not defined.

        Raises:
            NotFiniteError: a value is infinite or NaN. RangeError: a value is beyond the wire dtype's largest.
        """
        data = self._data(flat)
        message = Message(checked_count("round", round), checked_count("num_samples", num_samples))
        if out is None:
            out = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=data.is_cuda)
        elif not isinstance(out, Tensor):
            raise TypeError(f"out: {type(out).__name__}, wanted a contiguous uint8 tensor ({self.nbytes},)")
        elif out.dtype != torch.uint8 or out.shape != (self.nbytes,) or not out.is_contiguous() or not out.is_cpu:
            what = f"{out.dtype} {tuple(out.shape)} on {out.device}"
            raise ValueError(f"out: {what}, wanted contiguous uint8 ({self.nbytes},) in host memory")
        elif not is_aligned(out):
            raise ValueError(f"out: starts at {out.data_ptr():#x}, wanted a multiple of {ALIGNMENT}")
        payload = out[self._header.nbytes :]
        staged = payload if data.is_cpu else torch.empty_like(payload, device=data.device)
        run("wire_pack_", data, data, self._table_on(data.device), *self._typed(staged))
        if staged is not payload:
            payload.copy_(staged)  # returns when the bytes are there: the checksums read them
        checksums, bad = digest(payload, self._ranges)
        if any(bad):
            self._refuse_values(bad.index(True), data)
        header = self._header.write(message.round, message.num_samples, checksums)
        out[: self._header.nbytes] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        return out

    def read(self, buffer: Buffer, round: int | None = None) -> Message:
        """Round and sample count of a message that passes every check; with ``round``, one of that round."""
        return self._open(buffer, round)[1]

    def unpack(self, buffer: Buffer, round: int | None = None) -> dict[str, Tensor]:
        """The tensors of a message by name, in the wire dtype, after every check.

        They are views of ``buffer``, without a copy; only ``bytes`` (which torch cannot hold unwritable) and memory
        that is not 8-byte aligned are copied once. int8: ``name`` is int8 and ``name + ".scale"`` float32 (rows,).
        """
        payload, _ = self._open(buffer, round)
        return {p.name: payload[p.start : p.stop].view(p.dtype.torch).view(p.shape) for p in self._payloads}

    def load(self, buffer: Buffer, flat: FlatBuffers, round: int | None = None) -> Message:
        """Write the values of a message into ``flat.data``, after every check: all of them or, on an error, none."""
        data = self._data(flat)
        payload, message = self._open(buffer, round)
        run("wire_unpack_", data, *self._typed(payload.to(data.device)), self._table_on(data.device), data)
        torch.autograd.graph.increment_version(flat.data)
        return message

    def gather(self, flat: FlatBuffers) -> Tensor:
        """The values of ``flat`` that travel, float32 (numel,), in the order of ``names``, on ``flat``'s device."""
        data = self._data(flat)
        values = torch.empty(self.numel, dtype=torch.float32, device=data.device)
        run("wire_pack_", data, data, self._table_on(data.device), values, values[:0])
        return values

    def scatter_(self, values: Tensor, flat: FlatBuffers) -> None:
        """Write float32 ``values`` (numel,), as :func:`aggregate` and :meth:`gather` give them, into ``flat.data``."""
        data = self._data(flat)
        check_values("values", values, torch.float32, self.numel)
        values = values.detach().to(data.device)
        run("wire_unpack_", data, values, values[:0], self._table_on(data.device), data)
        torch.autograd.graph.increment_version(flat.data)

    def add_(self, sum: Tensor, buffer: Buffer, weight: float, round: int | None = None) -> Message:
        """sum += weight · values of a message that passes every check; ``sum`` is float64 (numel,)."""
        check_values("sum", sum, torch.float64, self.numel)
        weight = checked_weight("weight", weight)
        payload, message = self._open(buffer, round)
        payload = payload.to(sum.device)
        run("wire_accumulate_", sum, sum, *self._typed(payload), self._table_on(sum.device), weight)
        return message

    def _open(self, buffer: Buffer, round: int | None) -> tuple[Tensor, Message]:
        """Data and message of a buffer, after every check.

        The header that this plan would write for the data is compared first; only one that differs is parsed, to be
        read when it says the same in other words (spaces, order of keys, a later minor version), else refused.
        """
        raw = bytes_of(buffer)
        start = raw[: self._header.nbytes].numpy().tobytes()
        size = self._header.size_of(start, len(raw))
        checksums: list[int] = []
        if len(raw) == self.nbytes and size == self._header.nbytes and (message := self._header.peek(start)):
            payload = raw[size:]
            checksums, bad = digest(payload, self._ranges)
            if start == self._header.write(message.round, message.num_samples, checksums):
                return self._accepted(payload, message, bad, round)
        message, declared = self._header.read(raw[LENGTH_BYTES:size].numpy().tobytes(), len(raw) - size)
        payload = raw[size:]
        checksums, bad = digest(payload, self._ranges)
        for p, found, wanted in zip(self._payloads, checksums, declared, strict=True):
            if found != wanted:
                raise ChecksumError(p.name, f"CRC32C {found:08x}, the header says {wanted:08x}")
        return self._accepted(payload, message, bad, round)

    def _accepted(
        self, payload: Tensor, message: Message, bad: list[bool], round: int | None
    ) -> tuple[Tensor, Message]:
        if any(bad):
            raise NotFiniteError(self._payloads[bad.index(True)].name, "holds an infinite value or NaN")
        if round is not None and message.round != round:
            raise RoundError("metadata.round", f"{message.round}, wanted {round}")
        return payload, message

    def _refuse_values(self, index: int, data: Tensor) -> None:
        name = self._payloads[index].name
        entry = next(e for e in self._entries if name in (e.name, f"{e.name}.scale"))
        values = data[entry.offset : entry.offset + entry.numel]
        if not bool(values.isfinite().all()):
            raise NotFiniteError(entry.name, "holds an infinite value or NaN")
        most, largest = values.abs().max().item(), torch.finfo(self._wire_dtype).max
        raise RangeError(entry.name, f"magnitude {most:g} does not fit {self.dtype}, whose largest is {largest:g}")

    def _data(self, flat: FlatBuffers) -> Tensor:
        """The flat buffer without autograd, if it is the adapter that the plan was made for."""
        check_flat(flat)
        data = flat.data.detach()
        if data.dtype != torch.float32 or data.shape != (self._flat_numel,) or not data.is_contiguous():
            what = f"{data.dtype} {tuple(data.shape)}"
            raise ValueError(f"flat.data: {what}, wanted contiguous torch.float32 ({self._flat_numel},)")
        if flat.entries is not self._entries and tuple(flat.entries) != self._entries:
            raise ValueError("flat.entries: not those that the plan was made for")
        if flat.identity != self._identity:
            raise ValueError("flat.identity: not that which the plan was made for")
        return data

    def _table_on(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def _typed(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """The values and (int8) the scales of a message's data."""
        scales, values = payload[: self._scales_nbytes], payload[self._scales_nbytes :]
        return values.view(self._wire_dtype), scales.view(torch.float32)


def _merged(entries: Sequence[Entry]) -> tuple[tuple[int, int], ...]:
    slices: list[tuple[int, int]] = []
    for e in entries:
        if e.numel and slices and slices[-1][1] == e.offset:
            slices[-1] = (slices[-1][0], e.offset + e.numel)
        elif e.numel:
            slices.append((e.offset, e.offset + e.numel))
    return tuple(slices)


def _table(entries: Sequence[Entry]) -> Tensor:
    """int64 (lines, 5): offset in the flat buffer, offset among the values sent, first row sent, rows, row length."""
    parts, value, row = [torch.empty(0, 5, dtype=torch.int64)], 0, 0
    for e in entries:
        offset, first, rows, length = row_layout([replace(e, offset=0)]).unbind(1)
        parts.append(torch.stack([offset + e.offset, offset + value, first + row, rows, length], 1))
        value, row = value + e.numel, row + e.rows
    return torch.cat(parts)
