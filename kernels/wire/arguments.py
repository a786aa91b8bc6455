"""Checks of what a caller gives to a plan: adapters, layers, counts, buffers. Errors name the argument."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._memory import check_apart
from ..layout import Entry, FlatBuffers
from .errors import WeightError
from .format import ALIGNMENT, DIGITS, names_of

SMALLEST, LARGEST = 1e-100, 1e100  # of a weight: weight · value stays exact to 2⁻⁵³ in float64
Buffer = Tensor | bytes | bytearray | memoryview


def checked_flat(flat: FlatBuffers) -> tuple[Tensor, Sequence[Entry], Mapping[str, str]]:
    """Data, entries and identity of an adapter that has them."""
    try:
        data, entries, identity = flat.data, flat.entries, flat.identity
    except AttributeError:
        what = type(flat).__name__
        raise TypeError(f"flat: {what}, wanted a FlatAdapter (data, entries and identity)") from None
    check = getattr(flat, "check", None)
    if check is not None:
        check()
    if not isinstance(data, Tensor):
        raise TypeError(f"flat.data: {type(data).__name__}, wanted a torch.Tensor")
    return data, entries, identity


def mark_written(flat: FlatBuffers) -> None:
    """Tell autograd that ``flat.data`` was written, and what else lies in its memory."""
    torch.autograd.graph.increment_version(flat.data)
    changed = getattr(flat, "changed", None)
    if changed is not None:
        changed()


class Adapter:
    """What a plan keeps of the adapter that it was made for: ``entries``, ``identity``."""

    def __init__(self, flat: FlatBuffers, dtype: str, sparse: bool) -> None:
        _, entries, identity = checked_flat(flat)
        self.entries, self.identity = tuple(entries), dict(identity)
        self._equal = self.entries  # an equal tuple that was seen last: comparing all of them costs time
        self._numel = check_entries(self.entries, self.identity, dtype, sparse)
        self.data(flat)

    def data(self, flat: FlatBuffers) -> Tensor:
        """The flat buffer without autograd, refused unless it is of that adapter."""
        data, entries, identity = checked_flat(flat)
        if data.requires_grad:
            data = data.detach()
        if data.dtype != torch.float32 or data.shape != (self._numel,) or not data.is_contiguous():
            what = f"{data.dtype} {tuple(data.shape)}"
            raise ValueError(f"flat.data: {what}, wanted contiguous torch.float32 ({self._numel},)")
        if entries is not self._equal:
            if tuple(entries) != self.entries:
                raise ValueError("flat.entries: not those that the plan was made for")
            self._equal = entries if type(entries) is tuple else self.entries
        if identity != self.identity:
            raise ValueError("flat.identity: not that which the plan was made for")
        return data


def check_entries(entries: tuple[Entry, ...], identity: Mapping[Any, Any], dtype: str, sparse: bool) -> int:
    """Refuse entries that cannot be a file of named tensors over one buffer; return the number of their values."""
    end = 0
    names: set[str] = set()
    for e in entries:
        if e.offset != end:
            raise ValueError(f"flat.entries: {e.name!r} starts at {e.offset}, wanted {end}: entries must be contiguous")
        end += e.numel
        for name in names_of(e.name, dtype, sparse):
            if name in names or name == "__metadata__":
                raise ValueError(f"flat.entries: the name {name!r} stands twice or is reserved")
            names.add(name)
    for text in [*names, *identity.keys(), *identity.values()]:
        if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"flat: {text!r} among names and identity, wanted text that UTF-8 can hold")
    return end


def sorted_layers(layers: Iterable[int] | None, entries: Sequence[Entry]) -> tuple[int, ...]:
    known = {e.layer for e in entries if e.layer is not None}
    if layers is None:
        return tuple(sorted(known))
    try:
        given = list(layers)
        found = [operator.index(layer) for layer in given]
    except TypeError:
        raise TypeError(f"layers: {layers!r}, wanted block indices, some of {sorted(known)}") from None
    if any(isinstance(layer, bool) or getattr(layer, "dtype", None) == torch.bool for layer in given):
        raise TypeError(f"layers: {given}, wanted block indices; choose from a mask with mask.nonzero()")
    if unknown := sorted(set(found) - known):
        raise ValueError(f"layers: no block {unknown[0]} in flat.entries, which have {sorted(known)}")
    if len(set(found)) != len(found):
        raise ValueError(f"layers: {found}, wanted each block once")
    return tuple(sorted(found))


def checked_count(name: str, value: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: {value!r}, wanted an integer") from None
    if not 0 <= value < 10**DIGITS:
        raise ValueError(f"{name}: {value}, wanted 0 ≤ {name} < 10^{DIGITS}")
    return value


class _Memory:
    """Memory that must not be written, for NumPy and torch to see without a copy or a warning: it is only read."""

    def __init__(self, view: memoryview) -> None:
        self._view = view  # keeps it alive
        address = np.frombuffer(view, np.uint8).ctypes.data
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (len(view),), "data": (address, False)}


def bytes_of(buffer: Buffer, writable: bool = False) -> Tensor:
    """The bytes of a message as an aligned uint8 tensor, without a copy where that can be. ``writable``: of ``bytes``,
    which cannot be written, it cannot."""
    raw = view_of(buffer, writable)
    return raw if is_aligned(raw) else raw.clone()


def view_of(buffer: Buffer, writable: bool = False) -> Tensor:
    """The same, wherever it lies."""
    if not isinstance(buffer, Tensor):
        try:
            view = memoryview(buffer).cast("B")
        except TypeError:
            what = type(buffer).__name__
            raise TypeError(
                f"buffer: {what}, wanted a uint8 tensor or contiguous bytes, bytearray or memoryview"
            ) from None
        if not len(view):
            return torch.empty(0, dtype=torch.uint8)
        if view.readonly and not writable:
            buffer = torch.from_numpy(np.asarray(_Memory(view)))
        else:
            buffer = torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous() or not buffer.is_cpu:
        what = f"{buffer.dtype} {tuple(buffer.shape)} on {buffer.device}"
        raise TypeError(f"buffer: {what}, wanted contiguous uint8 (bytes,) in host memory")
    return buffer


def is_aligned(buffer: Tensor) -> bool:
    """Both its address and its place in its storage: a view in another dtype asks for the second."""
    return buffer.data_ptr() % ALIGNMENT == 0 and buffer.storage_offset() % ALIGNMENT == 0


def checked_weight(name: str, value: float, index: int | None = None, field: str = "weight") -> float:
    """A weight as a float. Raises TypeError for what is no number, WeightError, of ``field``, for one outside the
    range."""
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        weight = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: {value!r}, wanted a number") from None
    except OverflowError:
        weight = math.inf
    if not (math.isfinite(weight) and SMALLEST <= weight <= LARGEST):
        raise WeightError(field, f"{weight}, wanted a finite number above 0, from {SMALLEST:g} to {LARGEST:g}", index)
    return weight


def check_values(name: str, values: Tensor, dtype: torch.dtype, numel: int) -> None:
    """Refuse what is not a contiguous tensor (numel,) of ``dtype``."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: {type(values).__name__}, wanted a torch.Tensor")
    if values.dtype != dtype or values.shape != (numel,) or not values.is_contiguous():
        raise ValueError(f"{name}: {values.dtype} {tuple(values.shape)}, wanted contiguous {dtype} ({numel},)")


def check_written(name: str, values: Tensor, dtype: torch.dtype, numel: int, **others: Tensor | None) -> Tensor:
    """What of ``values`` can be written, refused like :func:`check_values`, or where it shares memory with another."""
    check_values(name, values, dtype, numel)
    if values.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name}: made in inference mode, wanted an ordinary tensor: it is written")
    beside = {other: t for other, t in others.items() if t is not None and t.device == values.device}
    check_apart({name: values, **beside}, changed=(name,))
    return values.detach()


def check_out(out: Tensor, nbytes: int) -> None:
    """Refuse a buffer that a message of ``nbytes`` cannot be written into."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out: {type(out).__name__}, wanted a contiguous uint8 tensor ({nbytes},)")
    if out.dtype != torch.uint8 or out.shape != (nbytes,) or not out.is_contiguous() or not out.is_cpu:
        what = f"{out.dtype} {tuple(out.shape)} on {out.device}"
        raise ValueError(f"out: {what}, wanted contiguous uint8 ({nbytes},) in host memory")
    if not is_aligned(out):
        raise ValueError(f"out: starts at {out.data_ptr():#x}, wanted a multiple of {ALIGNMENT}")
