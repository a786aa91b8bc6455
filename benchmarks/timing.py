"""How long calls take, side by side: every round runs each of them once, so a machine that drifts slows them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from time import perf_counter_ns
from typing import Literal

import torch

Call = Callable[[], object]
Mode = Literal["cold", "all cold", "warm"]

FLUSH_BYTES = 1 << 28  # more than any cache holds


class Rounds:
    """Milliseconds of each call in each round.

    all cold: before a call a buffer larger than any cache is read, so that on the CPU its code, Python's included, must
    come from memory as its data must. cold: then its rehearsal is made, the same call on little data, so that only its
    data must. warm: before a call the same call is made untimed. On CUDA the time is between two events on the stream;
    on the CPU it is the wall clock's.
    """

    def __init__(
        self, calls: Mapping[str, Call], mode: Mode, device: torch.device, rehearsals: Mapping[str, Call] | None = None
    ) -> None:
        self.calls, self.rehearsals = dict(calls), dict(rehearsals or {})
        self.milliseconds: dict[str, list[float]] = {name: [] for name in calls}
        self._mode, self._device = mode, device
        self._flush = torch.ones(0 if mode == "warm" else FLUSH_BYTES // 4, device=device)

    def run(self) -> None:
        """One round; who goes first changes from round to round."""
        names = list(self.calls)
        first = len(self.milliseconds[names[0]]) % len(names)
        for name in names[first:] + names[:first]:
            call = self.calls[name]
            if self._mode == "warm":
                call()
            else:
                self._flush.sum()
                if self._mode == "cold" and name in self.rehearsals:
                    self.rehearsals[name]()
            self.milliseconds[name].append(self._timed(call))

    def _timed(self, call: Call) -> float:
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)
        start = perf_counter_ns()
        call()
        return (perf_counter_ns() - start) / 1e6


def rounds_within(seconds: float, round_seconds: float, least: int = 5, most: int = 100) -> int:
    """How many rounds of ``round_seconds`` fit into ``seconds``, within bounds."""
    return max(least, min(most, int(seconds / max(round_seconds, 1e-9))))


def host_microseconds(call: Call, device: torch.device, repeats: int = 20) -> float | None:
    """Time the host needs to launch a call, the median; None on the CPU, where it is part of the call."""
    if device.type != "cuda":
        return None
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = perf_counter_ns()
        call()
        times.append((perf_counter_ns() - start) / 1e3)
    torch.cuda.synchronize()
    return sorted(times)[len(times) // 2]


def launches(call: Call, device: torch.device) -> int | None:
    """Number of kernels and copies that a call puts on the device; None on the CPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def peak_bytes(call: Call, device: torch.device) -> int:
    """Memory that torch's allocator held for a call at its peak beyond what it held before, results included.

    What libraries allocate on their own (oneDNN's scratch) is not seen. Exact: the same call gives the same number.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    call()  # what is allocated once and kept is not the call's
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(accumulate(changes, initial=0))
