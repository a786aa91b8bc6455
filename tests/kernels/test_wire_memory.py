"""What averaging holds: one accumulator and one message, however many devices send."""

from __future__ import annotations

import gc
import tracemalloc
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import peak_bytes
from fibecfed_kernels import WireError, WirePlan, aggregate

from .wire_tools import DTYPES, make_flat

CPU = torch.device("cpu")
SHAPES = ((0, (16, 1000)), (1, (1000, 16)), (None, (7,)))


def planned(dtype: str) -> tuple[WirePlan, Tensor]:
    flat = make_flat(SHAPES, spread=0.4)
    plan = WirePlan(flat, (0, 1), dtype)  # type: ignore[arg-type]
    return plan, plan.pack(flat, round=1, num_samples=1)


def received(message: Tensor, broken: bool) -> Tensor:
    """The message in memory of its own; a broken one fails its checksum."""
    copy = message.clone()
    copy[-1] ^= broken
    return copy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken_from", [None, 1], ids=["all good", "all but one refused"])
def test_the_peak_does_not_grow_with_the_devices(dtype: str, broken_from: int | None) -> None:
    plan, message = planned(dtype)

    def peak(devices: int) -> int:
        refused: list[WireError] = []  # kept: a reason must not keep its message

        def call() -> None:
            messages = (received(message, broken_from is not None and i >= broken_from) for i in range(devices))
            aggregate(plan, messages, [1.0] * devices, on_refused=lambda _, error: refused.append(error))

        return peak_bytes(call, CPU)

    accumulator, mean = 8 * plan.numel, 4 * plan.numel
    assert peak(3) == peak(30)
    assert 0 <= peak(30) - (accumulator + max(plan.nbytes, mean)) < 4096  # the rest: a few flags a tensor


@pytest.mark.parametrize("broken_from", [None, 1], ids=["all good", "all but one refused"])
def test_a_message_is_let_go_before_the_next_is_asked_for(broken_from: int | None) -> None:
    plan, message = planned("float32")
    gone: list[bool] = []

    def watched() -> Iterator[Tensor]:
        for i in range(4):
            buffer = received(message, broken_from is not None and i >= broken_from)
            alive = weakref.ref(buffer)
            yield buffer
            del buffer
            gone.append(alive() is None)

    gc.disable()  # let go, not collected later
    try:
        aggregate(plan, watched(), iter([1.0] * 4), on_refused=lambda *_: None)
    finally:
        gc.enable()
    assert gone == [True] * 4


def test_bytes_are_read_where_they_are_and_unpacked_into_a_copy() -> None:
    flat = make_flat(SHAPES, spread=0.4)
    plan = WirePlan(flat)
    raw = plan.pack(flat, round=1, num_samples=1).numpy().tobytes()
    into, before = make_flat(SHAPES, seed=3), bytes(bytearray(raw))
    for same in (raw, memoryview(raw), memoryview(bytearray(raw)).toreadonly()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert peak_bytes(lambda same=same: plan.load(same, into), CPU) < 4096
        tracemalloc.start()
        try:
            plan.load(same, into)
            assert tracemalloc.get_traced_memory()[1] < plan.nbytes // 2  # nor a copy of Python's
        finally:
            tracemalloc.stop()
        assert torch.equal(into.data, flat.data)
        for tensor in plan.unpack(same).values():
            tensor.zero_()
        assert bytes(same) == before


class Calls(TorchDispatchMode):
    """Names of the library's ops, as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "fibecfed":
            self.names.append(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def test_messages_of_a_list_are_added_all_at_once() -> None:
    plan, _ = planned("float32")
    messages = [plan.pack(make_flat(SHAPES, seed, spread=0.4), round=1, num_samples=1 + seed) for seed in range(4)]
    with Calls() as calls:
        aggregate(plan, messages)
    assert calls.names == ["wire_read_"] * 4 + ["wire_mean_"]
    wanted = aggregate(plan, iter(messages))
    messages[1] = torch.cat([messages[1].new_zeros(1), messages[1]])[1:]  # is copied, so it is added by itself
    with Calls() as calls:
        found = aggregate(plan, messages)
    assert calls.names == ["wire_read_", "wire_accumulate_", "wire_read_", *["wire_read_"] * 2, "wire_mean_"]
    assert torch.equal(found, wanted)


def test_a_mean_may_be_written_over_a_message_that_it_is_of() -> None:
    """A little behind its values, which would be written before they are read."""
    flat = make_flat(((0, (40, 100)),), spread=0.4)
    plan = WirePlan(flat)
    message = plan.pack(flat, round=1, num_samples=1)
    room = torch.cat([message, message.new_zeros(64)])
    messages, out = [message, room[: len(message)]], room[len(room) - 4 * plan.numel :].view(torch.float32)
    assert torch.equal(aggregate(plan, messages, [1.0, 2.0], out=out), plan.gather(flat))
