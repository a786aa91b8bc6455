"""Messages relative to values that both ends have: differences, some rows only, and error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import Entry
from .arguments import check_values, check_written
from .digest import digest_of
from .errors import NotFiniteError
from .frame import Frame, running
from .rows import Rows


class Base(NamedTuple):
    """What a message is relative to, float32 (numel,), and its CRC32C; None and 0 where it is relative to nothing."""

    values: Tensor | None
    crc32c: int

    def on(self, device: torch.device) -> Tensor:
        """The values there. Only of a relative plan's."""
        assert self.values is not None
        return self.values.to(device)


NO_BASE = Base(None, 0)


class Sent(NamedTuple):
    """What is sent of the differences (or values): all, or those at ``positions``, with the rows' indices."""

    frame: Frame
    values: Tensor
    indices: Tensor | None
    positions: Tensor | None


class Relation:
    """How the messages of a plan relate to the values of an adapter. frame: of a message that carries every row."""

    def __init__(self, frame: Frame, delta: bool, entries: Sequence[Entry], chosen: Sequence[Entry]) -> None:
        self.delta, self.frame = delta, frame
        self.rows = Rows(entries, chosen) if frame.agreed.sparse else None

    def base(self, base: Tensor | Base | None) -> Base:
        """The argument ``base`` of a plan's methods, checked: there where it is needed, and nowhere else."""
        if isinstance(base, Base):
            return base
        if not self.frame.agreed.based:
            if base is not None:
                raise ValueError("base: given, wanted None: the plan is neither delta nor sparse")
            return NO_BASE
        if base is None:
            raise ValueError(f"base: None, wanted float32 ({self.frame.numel},): the plan is delta or sparse")
        check_values("base", base, torch.float32, self.frame.numel)
        crc, finite = digest_of(base.detach())
        if not finite:
            raise ValueError("base: holds an infinite value or NaN")
        return Base(base.detach(), crc)

    def sent(self, values: Tensor, base: Base, rows: Tensor | None, residual: Tensor | None) -> Sent:
        """What is to be sent; ``values``, all that could be, become what they are relative to the base, in place."""
        if self.delta:
            values -= base.on(values.device)
        if residual is not None:
            values += residual.to(values.device)
        if self.rows is None:
            if rows is not None:
                raise ValueError("rows: given, wanted None: the plan is not sparse")
            return Sent(self.frame, values, None, None)
        chosen = self.rows.chosen(rows)
        positions = self.rows.positions(chosen).to(values.device)
        frame = Frame(self.rows.parts(chosen), self.frame.agreed)
        return Sent(frame, values[positions], self.rows.indices(chosen), positions)

    def residual(self, residual: Tensor | None, base: Base, data: Tensor) -> Tensor | None:
        """The argument ``residual`` of a plan's pack, checked."""
        if residual is None:
            return None
        if not self.delta:
            raise ValueError("residual: given, wanted None: error feedback is for differences, so a delta plan")
        others = {"base": base.values, "flat.data": data}
        return check_written("residual", residual, torch.float32, self.frame.numel, **others)

    def keep(self, residual: Tensor, values: Tensor, sent: Sent, decoded: Tensor) -> None:
        """residual ← values − what a receiver gets of them."""
        if sent.positions is None:
            values -= decoded
        else:
            values[sent.positions] -= decoded
        residual.copy_(values)

    def values(self, decoded: Tensor, rows: Tensor | None, base: Base) -> Tensor:
        """The adapter's values, float32 (numel,), from what a message carries, relative to a base.

        Raises NotFiniteError where base and difference together are beyond float32.
        """
        own = base.on(decoded.device)
        if self.rows is None or rows is None:
            return self._finite(own + decoded)
        positions, result = self.rows.positions(rows).to(decoded.device), own.clone()
        result[positions] = own[positions] + decoded if self.delta else decoded
        return self._finite(result)

    def _finite(self, values: Tensor) -> Tensor:
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            ends = running([p.numel for p in self.frame.parts], last=True)[1:]
            name = next(p.name for p, end in zip(self.frame.parts, ends, strict=True) if int(bad[0]) < end)
            raise NotFiniteError(name, "the sum of base and difference is beyond float32")
        return values
