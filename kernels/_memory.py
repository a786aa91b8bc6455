"""Whose memory is whose: what an op writes must be its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def check_apart(tensors: Mapping[str, Tensor], changed: Sequence[str]) -> None:
    """Raise ValueError, with both names, where one of ``changed`` and another tensor lie, in part, in the same memory.

    All are on one device. Addresses alone are looked at; that of an empty tensor is 0.
    """
    end = end_changed = 0
    last = last_changed = ""
    for start, size, name in sorted((t.data_ptr(), t.nbytes, name) for name, t in tensors.items()):
        other = last_changed if start < end_changed else last if name in changed and start < end else None
        if other is not None:
            raise ValueError(f"{name}: shares memory with {other}, wanted tensors that do not overlap")
        if start + size > end:
            end, last = start + size, name
        if name in changed:
            end_changed, last_changed = start + size, name
