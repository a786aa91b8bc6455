"""WirePlan: what travels, where it lies in a message and in the flat buffer; packs, checks and loads messages."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .._dispatch import run
from ..layout import FlatBuffers, merged_spans
from .arguments import (
    Adapter,
    Buffer,
    bytes_of,
    check_out,
    check_values,
    check_written,
    checked_count,
    checked_weight,
    mark_written,
    sorted_layers,
)
from .format import DTYPES, LENGTH_BYTES, Message, WireDtype, fingerprint_of
from .frame import Frame, running, table_of
from .header import Agreed
from .reader import OWN, Opened, Target, opened
from .relative import Base, Relation

CPU = torch.device("cpu")
NOWHERE = torch.empty(0, dtype=torch.float32, device=CPU)


class WirePlan:
    """How the chosen layers of a flat adapter travel: a safetensors file, laid out once, filled again and again.

    Args:
        flat: the adapter (:class:`fibecfed_kernels.FlatBuffers`); only its entries and identity are kept.
        layers: indices of the transformer blocks that travel, in any order; None: all. Entries without a block (the
            head) always do.
        dtype: of the values on the wire. ``"float32"`` is exact; ``"bfloat16"`` and ``"float16"`` round to nearest
            even, by at most 2⁻⁹ and 2⁻¹² of a value's next power of two (float16: or 2⁻²⁵, if that is more);
            ``"int8"`` sends q = round(x / s) with one float32 scale s = max|row| / 127 a row (tensor ``name +
            ".scale"``), error at most s/2; ``"int4"`` with s = max|block| / 7 for every 64 values of a parameter, 4.5
            bits a value, error at most s/2. Rows and blocks whose maximum is below 127·2⁻¹²⁶ (7·2⁻¹²⁶) are sent as
            zeros, scale 0.
        delta: send x − base instead of x. Receivers have the same ``base``, float32 (numel,): what :meth:`gather` gives
            after the last broadcast was loaded. The bounds above then hold for the difference, and 2⁻²⁴ of difference
            and value come to them for the two float32 operations.
        sparse: send only the rows of a mask, 4 bytes more a row; the others stand where ``base`` has them, as frozen
            rows do.

    Attributes: ``names`` of the entries that travel, ``layers`` (sorted), ``dtype``, ``delta``, ``sparse``, ``numel``
    values, ``nbytes`` of a message (sparse: of one with every row), ``max_bytes`` that any message of this plan can
    have, another writer's included, so that a transport need not receive more; ``fingerprint`` (hex), ``slices`` of the
    flat buffer that travel: (start, stop) in values, merged.

    A plan never changes, so threads may share it. All methods raise TypeError or ValueError for arguments that do not
    fit, and the :class:`WireError` that says why for a message that is refused. Those that take a message also take
    ``round``: if given, it must be of that round; ``base``: as above, in a delta or sparse plan and only there;
    ``max_bytes``: a longer one is refused before it is looked at.
    """

    def __init__(
        self,
        flat: FlatBuffers,
        layers: Iterable[int] | None = None,
        dtype: WireDtype = "float32",
        *,
        delta: bool = False,
        sparse: bool = False,
    ) -> None:
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r}, wanted one of the names {', '.join(map(repr, DTYPES))}")
        self.dtype: WireDtype = dtype
        for name, option in (("delta", delta), ("sparse", sparse)):
            if not isinstance(option, bool):
                raise TypeError(f"{name}: {option!r}, wanted True or False")
        self.delta, self.sparse = delta, sparse
        self._adapter = Adapter(flat, dtype, sparse)
        entries = self._adapter.entries
        self.layers = sorted_layers(layers, entries)
        chosen = tuple(e for e in entries if e.layer is None or e.layer in self.layers)
        self.names = tuple(e.name for e in chosen)
        self.numel = sum(e.numel for e in chosen)
        self.slices = merged_spans(chosen)
        identity = self._adapter.identity
        self.fingerprint = fingerprint_of(identity, chosen, self.layers, dtype, delta=delta, sparse=sparse)
        based = self.delta or self.sparse
        self._offsets = [e.offset for e in chosen]
        self._frame = Frame(chosen, Agreed(self.fingerprint, dtype, self.layers, based, self.sparse))
        self._relation = Relation(self._frame, self.delta, entries, chosen)
        self.nbytes = self._frame.nbytes
        self.max_bytes = LENGTH_BYTES + self._frame.header.limit + self._frame.header.data_nbytes
        self._tables: dict[tuple[str, torch.device], Tensor] = {
            ("flat to message", CPU): table_of(chosen, dtype, self._offsets),
            ("flat to values", CPU): table_of(chosen, "float32", self._offsets),
            ("values to message", CPU): table_of(chosen, dtype),
            ("values", CPU): table_of(chosen, "float32"),
        }

    def pack(
        self,
        flat: FlatBuffers,
        *,
        round: int,
        num_samples: int,
        out: Tensor | None = None,
        base: Tensor | None = None,
        rows: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The message: a safetensors file as uint8 (nbytes,) in host memory, pinned when ``flat.data`` is on CUDA.

        The same values, round and count (and base, rows, residual) give the same bytes.

        Args:
            out: uint8 (nbytes,), contiguous, 8-byte aligned, host memory: filled in place of a new tensor, whose first
                touch costs more than the copy. What it holds after an error is not defined. Not in a sparse plan.
            base: in a delta or sparse plan, float32 (numel,).
            rows: in a sparse plan, bool over all rows of ``flat``, like the mask of :class:`fibecfed.MaskedAdamW`;
                rows of blocks that do not travel are passed over.
            residual: in a delta plan, error feedback (Karimireddy et al. 2019, arXiv 1901.09847): float32 (numel,),
                zeros at first, kept by the sender from message to message. Sent is v = x − base + residual, and
                residual ← v − what a receiver gets of it (nothing, for rows that are not sent). Unchanged on an error.

        Raises:
            NotFiniteError: a value is infinite or NaN. RangeError: a value is beyond the wire dtype's largest.
        """
        data = self._adapter.data(flat)
        message = Message(checked_count("round", round), checked_count("num_samples", num_samples))
        of = self._relation.base(base)
        if of.values is None:
            for name, given in (("rows", rows), ("residual", residual)):
                if given is not None:
                    raise ValueError(f"{name}: given, wanted None: the plan is neither delta nor sparse")
            return self._write(self._frame, data, "flat to message", message, 0, out, None)
        if self.sparse and out is not None:
            raise ValueError("out: given, wanted None: a sparse message is as long as its rows")
        residual = self._relation.residual(residual, of, data)
        values = self._gathered(data)
        sent = self._relation.sent(values, of, rows, residual)
        packed = self._write(sent.frame, sent.values, "values to message", message, of.crc32c, out, sent.indices)
        if residual is not None:
            decoded = self._decoded(sent.frame, packed[sent.frame.header.nbytes :], data.device)
            self._relation.keep(residual, values, sent, decoded)
            torch.autograd.graph.increment_version(residual)
        return packed

    def read(
        self, buffer: Buffer, *, round: int | None = None, base: Tensor | None = None, max_bytes: int | None = None
    ) -> Message:
        """Round and sample count of a message that passes every check."""
        return self._open(buffer, round, self._relation.base(base), max_bytes).message

    def unpack(
        self, buffer: Buffer, *, round: int | None = None, base: Tensor | None = None, max_bytes: int | None = None
    ) -> dict[str, Tensor]:
        """The tensors of a message by name as they are stored (FORMAT.md), after every check.

        They are views of ``buffer``, without a copy; only what cannot be written, as ``bytes``, and memory that is not
        8-byte aligned are copied once. int8: ``name`` is int8 and ``name + ".scale"`` float32 (rows,).
        int4: two values a byte. Sparse: ``name + ".rows"`` are the int32 indices. Delta: differences.
        """
        found = self._open(bytes_of(buffer, writable=True), round, self._relation.base(base), max_bytes)
        return found.frame.unpack(found.payload)

    def load(
        self,
        buffer: Buffer,
        flat: FlatBuffers,
        *,
        round: int | None = None,
        base: Tensor | None = None,
        max_bytes: int | None = None,
    ) -> Message:
        """Write the values of a message into ``flat.data``, after every check: all of them or, on an error, none."""
        data, of = self._adapter.data(flat), self._relation.base(base)
        plain = of.values is None
        values = data if plain else data.new_empty(self.numel)
        table = self._table("flat to message" if plain else "values to message", data.device)
        found = self._open(buffer, round, of, max_bytes, Target(values, table))
        if plain and not found.decoded:
            run("wire_unpack_", data, *found.frame.typed(found.payload.to(data.device)), table, data)
        elif not plain:
            decoded = values if found.decoded else self._decoded(found.frame, found.payload, data.device)
            self._scatter(self._relation.values(decoded, found.rows, of), data)
        mark_written(flat)
        return found.message

    def gather(self, flat: FlatBuffers) -> Tensor:
        """The values of ``flat`` that travel, float32 (numel,), in the order of ``names``, on ``flat``'s device."""
        return self._gathered(self._adapter.data(flat))

    def scatter_(self, values: Tensor, flat: FlatBuffers) -> None:
        """Write float32 ``values`` (numel,), as :func:`aggregate` and :meth:`gather` give them, into ``flat.data``."""
        data = self._adapter.data(flat)
        check_values("values", values, torch.float32, self.numel)
        self._scatter(values.detach().to(data.device), data)
        mark_written(flat)

    def add_(
        self,
        sum: Tensor,
        buffer: Buffer,
        weight: float | None,
        *,
        round: int | None = None,
        base: Tensor | None = None,
        max_bytes: int | None = None,
    ) -> Message:
        """sum += weight · values of a message that passes every check; ``sum`` is float64 (numel,). A weight of None is
        the message's own sample count."""
        sum, of = check_written("sum", sum, torch.float64, self.numel), self._relation.base(base)
        if weight is not None:
            weight = checked_weight("weight", weight)
        table = self._table("values to message", sum.device)
        plain = of.values is None
        values = sum if plain else torch.empty(self.numel, dtype=torch.float32, device=sum.device)
        found = self._open(buffer, round, of, max_bytes, Target(values, table, OWN if weight is None else weight))
        if weight is None:  # 0 has added nothing so far
            weight = checked_weight("weight", found.message.num_samples, field="metadata.num_samples")
        if not plain:
            decoded = values if found.decoded else self._decoded(found.frame, found.payload, sum.device)
            values = self._relation.values(decoded, found.rows, of)
            run("wire_accumulate_", sum, sum, [values], [values[:0]], self._table("values", sum.device), [weight])
        elif not found.decoded:
            typed, scales = found.frame.typed(found.payload.to(sum.device))
            run("wire_accumulate_", sum, sum, [typed], [scales], table, [weight])
        torch.autograd.graph.increment_version(sum)
        return found.message

    def _checked(
        self, buffer: Buffer, round: int | None, base: Tensor | None, max_bytes: int | None
    ) -> tuple[Message, Tensor, Tensor]:
        """Of a message of a plain plan that passes every check: what it says, its values and scales as they are
        stored."""
        found = self._open(buffer, round, self._relation.base(base), max_bytes)
        return found.message, *found.frame.typed(found.payload)

    def _open(
        self, buffer: Buffer, round: int | None, base: Base, max_bytes: int | None, target: Target | None = None
    ) -> Opened:
        round = None if round is None else checked_count("round", round)
        max_bytes = None if max_bytes is None else checked_count("max_bytes", max_bytes)
        target = target or Target(NOWHERE, self._table("values to message", CPU))
        rows = self._relation.rows
        return opened(bytes_of(buffer), self._frame, rows, target, round, base.crc32c, max_bytes)

    def _write(
        self,
        frame: Frame,
        data: Tensor,
        table: str,
        message: Message,
        base: int,
        out: Tensor | None,
        indices: Tensor | None,
    ) -> Tensor:
        if out is None:
            out = torch.empty(frame.nbytes, dtype=torch.uint8, pin_memory=data.is_cuda)
        else:
            check_out(out, frame.nbytes)
        lines = self._table(table, data.device) if frame is self._frame else frame.table().to(data.device)
        bad = frame.write(data, lines, message, base, out, indices)
        if bad is not None:
            offsets = self._offsets if table == "flat to message" else running([p.numel for p in frame.parts])
            raise frame.refusal(bad, data, offsets)
        torch.autograd.graph.increment_version(out)
        return out

    def _decoded(self, frame: Frame, payload: Tensor, device: torch.device) -> Tensor:
        """What a message carries, float32, one part after the other."""
        values = torch.empty(frame.numel, dtype=torch.float32, device=device)
        table = self._table("values to message", device) if frame is self._frame else frame.table().to(device)
        run("wire_unpack_", values, *frame.typed(payload.to(device)), table, values)
        return values

    def _gathered(self, data: Tensor) -> Tensor:
        values = torch.empty(self.numel, dtype=torch.float32, device=data.device)
        run("wire_pack_", data, data, self._table("flat to values", data.device), values, values[:0])
        return values

    def _scatter(self, values: Tensor, data: Tensor) -> None:
        run("wire_unpack_", data, values, values[:0], self._table("flat to values", data.device), data)

    def _table(self, name: str, device: torch.device) -> Tensor:
        if (name, device) not in self._tables:  # a copy a device, made when first asked for
            self._tables[name, device] = self._tables[name, CPU].to(device)
        return self._tables[name, device]
