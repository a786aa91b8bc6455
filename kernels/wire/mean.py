"""The weighted mean of messages, taken as they arrive: one accumulator, however many devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._backend import backend
from .._dispatch import run
from .._memory import value_key
from .arguments import Buffer, check_written, checked_weight, is_aligned, view_of
from .errors import CountError, WireError
from .plan import WirePlan
from .relative import Base

CHUNK = 1 << 17  # values divided and rounded while they are in a cache
NO_SUM = torch.empty(0, dtype=torch.float64, device="cpu")


def aggregate(
    plan: WirePlan,
    buffers: Iterable[Buffer],
    weights: Iterable[float] | None = None,
    *,
    round: int | None = None,
    device: torch.device | str = "cpu",
    base: Tensor | None = None,
    max_bytes: int | None = None,
    accumulator: Tensor | None = None,
    out: Tensor | None = None,
    on_refused: Callable[[int, WireError], None] | None = None,
) -> Tensor:
    """Mean of the messages' values, Σ w_i v_i / Σ w_i, float32 (plan.numel,), in the order of ``plan.names``.

    ``plan.scatter_(mean, flat)`` writes it into a flat buffer.

    Args:
        plan: what the messages must be.
        buffers: messages. Of a generator, each is checked, added and let go before the next is asked for, so one that
            receives them holds one at a time. Those of a list, which are there anyway, are checked one by one and, on a
            CPU, added all at once; a message must not change meanwhile. The same bits either way.
        weights: one a message, finite, in [1e-100, 1e100]. None: FedAvg's, the sample counts that the messages state
            (a device can claim any number: give your own where that matters).
        round: if given, every message must be of it.
        device: where the sum is held; on CUDA a message is one copy and one launch.
        base: what the messages of a delta or sparse plan are relative to; what is averaged are the values that ``load``
            would give, so that a row that a message does not carry counts with its value in the base. It is looked
            at again where torch changed it meanwhile.
        max_bytes: a longer message is refused before it is looked at.
        accumulator: float64 (plan.numel,), overwritten where the sum needs memory, and out: float32 (plan.numel,),
            filled and returned, both contiguous and on one device, which is then that of the sum and the mean. Who
            averages again and again keeps them: the first touch of new memory can cost as much as the sum itself.
        on_refused: called with the index and the reason of each message that is refused, which is then left out of the
            mean, weight and all. None: the first one ends it. A given weight that is out of range ends it all the same.

    The sum is float64, 8 bytes a value: with n messages its error before the final rounding to float32 is below
    (n + 1)·2⁻⁵³·Σ w_i |v_i| / Σ w_i. So equal messages average to themselves exactly, in every wire dtype; and the
    order of arrival can show only where the mean lies within that distance of the middle of two float32 values. (A
    running float32 mean a ← a + (w/W)(v − a) would need half the memory, but keeps one rounding of 2⁻²⁴ a message and
    depends on the order.)

    Raises:
        CountError: no message, none that was taken, or not as many weights as messages. WeightError: a weight outside
            its range; a message of no samples, where these are the weights. WireError: a message is refused and there
            is no ``on_refused``; its ``index`` tells which.
    """
    if not isinstance(plan, WirePlan):
        raise TypeError(f"plan: {type(plan).__name__}, wanted a WirePlan")
    if isinstance(buffers, (Tensor, bytes, bytearray, memoryview)) or not isinstance(buffers, Iterable):
        raise TypeError(f"buffers: {type(buffers).__name__}, wanted messages one by one: a list or a generator")
    if weights is not None and (not isinstance(weights, Iterable) or isinstance(weights, (str, bytes))):
        raise TypeError(f"weights: {weights!r}, wanted a number for each message, or None")
    room = _Room(plan, accumulator, out, device)
    listed, plain = type(buffers) in (list, tuple), not (plan.delta or plan.sparse)
    together = listed and plain and room.device.type == "cpu" and backend("cpu") != "triton"
    adder = (_Together if together else _OneByOne)(plan, room, round, base, max_bytes)
    total, index, taken = 0.0, 0, 0
    messages, shares = iter(buffers), None if weights is None else iter(weights)
    while True:  # not zip or enumerate: they would keep a message alive while the next one is made
        try:
            buffer = next(messages)
        except StopIteration:
            break
        weight = None if shares is None else _next_weight(shares, index)
        try:
            total += adder.add(buffer, weight)
        except WireError as error:
            if on_refused is None:
                raise error.at(index) from None
            on_refused(index, error.at(index))
        else:
            taken += 1
        del buffer
        index += 1
    if shares is not None and next(shares, None) is not None:
        raise CountError("weights", f"more than the {index} messages, wanted one a message")
    if index == 0:
        raise CountError("buffers", "no messages, wanted at least one")
    if taken == 0:
        raise CountError("buffers", f"all {index} messages were refused")
    return adder.mean(total)


class _Room:
    """Where sum and mean are held, given or made when they are first needed."""

    def __init__(
        self, plan: WirePlan, accumulator: Tensor | None, out: Tensor | None, device: torch.device | str
    ) -> None:
        self._numel, self._out = plan.numel, out
        if out is not None:
            check_written("out", out, torch.float32, plan.numel)
        if accumulator is not None:
            accumulator = check_written("accumulator", accumulator, torch.float64, plan.numel, out=out)
        self._accumulator = accumulator
        given = accumulator if out is None else out
        self.device = torch.device(device) if given is None else given.device
        if accumulator is not None and accumulator.device != self.device:
            raise ValueError(f"accumulator: on {accumulator.device}, wanted {self.device}, where out is")

    @cached_property
    def sum(self) -> Tensor:
        if self._accumulator is not None:
            return self._accumulator.zero_()
        return torch.zeros(self._numel, dtype=torch.float64, device=self.device)

    @cached_property
    def mean(self) -> Tensor:
        return torch.empty(self._numel, dtype=torch.float32, device=self.device) if self._out is None else self._out


class _OneByOne:
    """Adds messages to the sum, each as it comes."""

    def __init__(
        self, plan: WirePlan, room: _Room, round: int | None, base: Tensor | None, max_bytes: int | None
    ) -> None:
        self._plan, self._room = plan, room
        self._round, self._base, self._max_bytes = round, base, max_bytes
        self._looked: tuple[object, Base | None] = (None, None)

    def add(self, buffer: Buffer, weight: float | None) -> float:
        """Add a message, if it passes every check; returns the weight that it has."""
        message = self._plan.add_(self._room.sum, buffer, weight, **self._given())
        return message.num_samples if weight is None else weight

    def _given(self) -> dict[str, Any]:
        """What is asked of each message; the base, which may be as large, is not looked at with each."""
        key = value_key(self._base) if isinstance(self._base, Tensor) else ()
        if self._looked[0] != key:
            self._looked = key, self._plan._relation.base(self._base)
        return {"round": self._round, "base": self._looked[1], "max_bytes": self._max_bytes}

    def mean(self, total: float) -> Tensor:
        """The sum divided by ``total``."""
        mean = self._room.mean
        self._divide(mean.detach(), total)
        torch.autograd.graph.increment_version(mean)
        return mean

    def _divide(self, mean: Tensor, total: float) -> None:
        sum = self._room.sum
        by = sum.new_tensor(total)  # by a number CUDA would multiply with its reciprocal, rounded
        room = sum[:CHUNK]  # that of the first chunk serves them all: quotients need not go back to memory
        for part, rounded in zip(sum.split(CHUNK), mean.split(CHUNK), strict=True):
            rounded.copy_(torch.div(part, by, out=room[: len(part)]))


class _Together(_OneByOne):
    """Checks each as it comes, and adds all when the last one is there: the same sums in the same order, which then
    need no memory."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._added = False
        self._values: list[Tensor] = []
        self._scales: list[Tensor] = []
        self._weights: list[float] = []

    def add(self, buffer: Buffer, weight: float | None) -> float:
        raw = view_of(buffer)
        if not is_aligned(raw):  # it will be copied: one copy at a time
            self._add_all()
            return super().add(raw, weight)
        message, values, scales = self._plan._checked(raw, **self._given())
        if weight is None:
            weight = checked_weight("weight", message.num_samples, field="metadata.num_samples")
        self._values.append(values)
        self._scales.append(scales)
        self._weights.append(weight)
        return weight

    def _add_all(self) -> None:
        sum = self._room.sum
        run("wire_accumulate_", sum, sum, self._values, self._scales, self._table(), self._weights)
        self._values, self._scales, self._weights, self._added = [], [], [], True

    def _divide(self, mean: Tensor, total: float) -> None:
        if self._weights and _overlaps(mean, (*self._values, *self._scales)):  # written before all of them is read
            self._add_all()
        if not self._weights:
            return super()._divide(mean, total)
        sum = self._room.sum if self._added else NO_SUM
        run("wire_mean_", mean, mean, sum, self._values, self._scales, self._table(), self._weights, total)

    def _table(self) -> Tensor:
        return self._plan._table("values to message", self._room.device)


def _overlaps(written: Tensor, others: Iterable[Tensor]) -> bool:
    start, end = written.data_ptr(), written.data_ptr() + written.nbytes
    return any(t.data_ptr() < end and t.data_ptr() + t.nbytes > start for t in others)


def _next_weight(shares: Iterator[float], index: int) -> float:
    try:
        given = next(shares)
    except StopIteration:
        raise CountError("weights", f"only {index}, wanted one a message") from None
    return checked_weight(f"weights[{index}]", given, index)
