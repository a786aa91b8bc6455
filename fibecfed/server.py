"""What the server does: hold the GAL and the head, draw devices, broadcast, average. And the store of local layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fibecfed_kernels import WireError, WirePlan, aggregate
from fibecfed_kernels.wire.errors import CountError

from .adapter import FlatAdapter
from .client import TrainResult
from .sections import Wire
from .seeds import stream


class Upload(NamedTuple):
    """What came of a device's work: its message and, of a round, what it says of its training; or a problem instead."""

    device: int
    message: Tensor | None = None
    result: TrainResult | None = None
    problem: str = ""


def average(
    plan: WirePlan, uploads: Iterable[Upload], sizes: Sequence[int] | np.ndarray, **options: Any
) -> tuple[Tensor | None, dict[int, str]]:
    """The mean of the uploads weighted by ``sizes[device]``, None where there is nothing to average; and {device:
    reason} of those with a problem, or whose message was refused. ``options``: of :func:`fibecfed_kernels.aggregate`.
    """
    arrived: list[int] = []
    left_out: dict[int, str] = {}

    def messages() -> Iterator[Tensor]:
        for upload in uploads:
            if upload.message is None:
                left_out[upload.device] = upload.problem
            else:
                arrived.append(upload.device)
                yield upload.message

    def refuse(place: int, error: WireError) -> None:
        left_out[arrived[place]] = f"{error.field}: {error.problem}"

    weights = (float(sizes[device]) for device in arrived)  # each is asked for when its message is there
    try:
        mean = aggregate(plan, messages(), weights, on_refused=refuse, **options)
    except CountError as error:
        if error.field != "buffers":  # there was no message, or none that was taken
            raise
        return None, dict(sorted(left_out.items()))
    return mean, dict(sorted(left_out.items()))


def plans(flat: FlatAdapter, gal: Sequence[int], wire: Wire) -> tuple[WirePlan, WirePlan]:
    """What the server sends and what the devices send."""
    return WirePlan(flat, gal, wire.down), WirePlan(flat, gal, wire.dtype, delta=wire.delta)


class Server:
    """Holds the travelling part of the adapter as one float32 vector; everything that leaves it is a wire message.

    Attributes: ``down`` and ``up``, the plans of what the server and what the devices send; ``base``: what devices have
    after the last broadcast, where they send differences to it, else None.
    """

    def __init__(self, flat: FlatAdapter, gal: Sequence[int], wire: Wire, seed: int) -> None:
        self.down, self.up = plans(flat, gal, wire)
        self.values = self.down.gather(flat)
        self.base: Tensor | None = None
        self._accumulator = torch.empty(self.values.numel(), dtype=torch.float64, device=self.values.device)
        self._flat = flat
        self._seed = seed

    def draw(self, round_: int, devices: int, per_round: int) -> list[int]:
        """Step 6: the devices of a round, uniformly without replacement, by the seed and the round alone."""
        return sorted(stream(self._seed, "draw", round_).choice(devices, size=per_round, replace=False).tolist())

    def broadcast(self, round_: int) -> Tensor:
        """The message with GAL and head that every device of the round gets (uint8)."""
        self.put()
        message = self.down.pack(self._flat, round=round_, num_samples=0)
        if self.up.delta:
            self.down.load(message, self._flat)  # rounded, where the wire rounds
            self.base = self.down.gather(self._flat)
        return message

    def put(self) -> None:
        """Write GAL and head into the buffer."""
        self.down.scatter_(self.values, self._flat)

    def average(self, uploads: Iterable[Upload], sizes: Sequence[int] | np.ndarray, round_: int) -> dict[int, str]:
        """Step 9: the mean of the uploads weighted by n_k, in float32; uploads are taken one at a time as they
        arrive.

        Returns {device: reason} of those that are left out. Where no other is there, the round is void and the server's
        values stay what they were.
        """
        mean, refused = average(self.up, uploads, sizes, round=round_, base=self.base, accumulator=self._accumulator)
        if mean is not None:
            self.values = mean
        return refused


class LocalStore:
    """What every device keeps between its rounds. Row k of ``rows``: device k's local layers, float32 (devices, local
    values); of ``residuals``: what its last message lost, with error feedback, float32 (devices, values sent).
    """

    def __init__(self, flat: FlatAdapter, gal: Sequence[int], devices: int, residual: int = 0) -> None:
        self._flat = flat
        self._slices = [flat.values(layer) for layer in flat.layers if layer not in set(gal)]
        self.initial = self._gather()
        self.rows = self.initial.expand(devices, -1).clone()
        self.residuals = self.rows.new_zeros(devices, residual)

    def _gather(self) -> Tensor:
        parts = [self._flat.data.detach()[s] for s in self._slices]
        return torch.cat(parts) if parts else self._flat.data.detach().new_zeros(0)

    def load(self, device: int) -> None:
        """Write device's local layers into the buffer."""
        self._put(self.rows[device])

    def save(self, device: int) -> None:
        """Keep the buffer's local layers as the device's."""
        self.rows[device] = self._gather()

    def reset(self) -> None:
        """Write the initial local layers into the buffer: the global model has no other."""
        self._put(self.initial)

    def _put(self, values: Tensor) -> None:
        self._flat.check()
        start = 0
        with torch.no_grad():
            for s in self._slices:
                stop = start + s.stop - s.start
                self._flat.data[s] = values[start:stop]
                start = stop


def weighted_mean(values: Sequence[float], weights: Sequence[int] | np.ndarray) -> float:
    """Σ_k w_k v_k / Σ_k w_k."""
    return float(np.average(np.asarray(values, dtype=np.float64), weights=np.asarray(weights, dtype=np.float64)))


def link_seconds(wire: Wire, up: int, down: int) -> float:
    """Modelled seconds of a round's exchange: the devices in parallel, each one message down and one up, in bytes."""
    return 2 * wire.latency_ms / 1e3 + 8 * (up / wire.up_mbit + down / wire.down_mbit) / 1e6
