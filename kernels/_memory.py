"""Tensors as memory: whose it is, for what an op writes must be its own, and whether its values have changed."""

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


def value_key(tensor: Tensor, *more: int) -> tuple[object, ...]:
    """What must be equal for an earlier check of the tensor's values to hold: reading them waits for a CUDA device.

    An inference tensor does not count its changes: its key equals nothing (a NaN would not do, tuples compare identity
    first). Changes past torch (by NumPy) are not seen.
    """
    return (*more, object() if tensor.is_inference() else tensor._version)
