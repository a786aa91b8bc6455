"""The GIL is free while C++ packs, loads and averages, and threads that do so at once do not disturb one another.

A witness, a thread that counts and gives the GIL up at each step, shows whether it was free. Nothing takes the GIL
from a thread here, since the switch interval is longer than any test: so while the main thread is in a call that holds
it, the count stands still, on however busy a machine. To see it move, both threads must run at once for a moment, so
calls are repeated until they do.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fibecfed_kernels import WirePlan, aggregate
from fibecfed_kernels._ops import FUSED, SCHEMAS

from .bodies import needs_cpp
from .wire_tools import DTYPES, make_flat

# 12 MiB of float32 and 6 or 12 of integers, whose checks alone are an op: a good part of a millisecond a call
LARGE = ((0, (1024, 1024)), (1, (4096, 256)), (None, (512, 2048)))
LARGER = ((0, (4096, 1024)), (1, (4096, 1024)), (None, (2048, 2048)))
STEPS = 3  # of the witness in one call: one is possible wherever the GIL changes hands, and it sleeps between two
CALLS = 500  # at most; a few are enough on an idle machine


class Witness:
    """A thread that counts its steps, as long as the block runs."""

    def __init__(self) -> None:
        self.steps, self._done = 0, False
        self._thread = threading.Thread(target=self._count, daemon=True)

    def _count(self) -> None:
        while not self._done:
            self.steps += 1
            time.sleep(0)  # gives the GIL up

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done = True
        self._thread.join()

    def during(self, call: Callable[[], Any]) -> tuple[int, Any]:
        """Steps while ``call`` ran, and its result."""
        before = self.steps
        result = call()
        return self.steps - before, result


@pytest.fixture
def witness(one_thread: None) -> Iterator[Witness]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(600)
    try:
        with Witness() as thread:
            yield thread
    finally:
        sys.setswitchinterval(before)


@pytest.fixture
def most(witness: Witness, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """By wire op that was called: the most steps of the witness in one call of it."""
    most: Counter[str] = Counter()

    def watched(name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.fibecfed, name).default

        def call(*args: Any) -> Any:
            steps, result = witness.during(lambda: op(*args))
            most[name] = max(most[name], steps)
            return result

        return call

    for name in (*SCHEMAS, *FUSED):
        if name.startswith("wire_"):
            monkeypatch.setattr(getattr(torch.ops.fibecfed, name), "default", watched(name))
    return most


def test_the_witness_stands_still_in_a_call_that_holds_the_gil(witness: Witness) -> None:
    holding, freeing = ctypes.PyDLL(None).usleep, ctypes.CDLL(None).usleep
    assert [witness.during(lambda: holding(2000))[0] for _ in range(20)] == [0] * 20
    assert any(witness.during(lambda: freeing(2000))[0] >= STEPS for _ in range(CALLS))


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["pack", "load", "aggregate"])
def test_the_gil_is_free_in_every_op_of(method: str, dtype: str, most: Counter[str]) -> None:
    flat = make_flat(LARGER if dtype.startswith("int") else LARGE, spread=0.2)
    plan = WirePlan(flat, (0, 1), dtype)  # type: ignore[arg-type]
    message = plan.pack(flat, round=1, num_samples=2)
    call = {
        "pack": lambda: plan.pack(flat, round=1, num_samples=2, out=message),
        "load": lambda: plan.load(message, flat),
        "aggregate": lambda: aggregate(plan, [message], [1.0]),
    }[method]
    most.clear()
    for _ in range(CALLS):
        call()
        if min(most.values()) >= STEPS:
            break
    assert most
    assert min(most.values()) >= STEPS, most


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_may_load_and_average_at_once(dtype: str) -> None:
    flats = [make_flat(seed=seed, spread=0.4) for seed in range(4)]
    plan = WirePlan(flats[0], (0, 1, 2), dtype)  # type: ignore[arg-type]
    messages = [plan.pack(flat, round=1, num_samples=seed) for seed, flat in enumerate(flats)]
    wanted = [aggregate(plan, [message], [1.0]) for message in messages]
    mean = aggregate(plan, messages, [1.0, 2.0, 3.0, 4.0])
    right: list[bool] = []

    def work(seed: int) -> None:
        into = make_flat(seed=9)
        for _ in range(60):
            right.append(torch.equal(plan.pack(flats[seed], round=1, num_samples=seed), messages[seed]))
            plan.load(messages[seed], into)
            right.append(torch.equal(plan.gather(into), wanted[seed]))
            right.append(torch.equal(aggregate(plan, messages, [1.0, 2.0, 3.0, 4.0]), mean))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads change places inside the Python around the ops, too
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(right) == 4 * 60 * 3
    assert all(right)
