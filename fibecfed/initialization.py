"""The initialization phase: layer sensitivities, the lossless rule, the GAL (steps 3 and 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import layers, lossless
from .fleet import Fleet, OnPhase
from .seeds import stream
from .server import weighted_mean
from .stopwatch import Stopwatch

SCALAR_BYTES = 8  # a sensitivity or a kept share travels as one float64
Answer = TypeVar("Answer")


@dataclass
class Choice:
    """What the initialization phase decided, and why."""

    gal: tuple[int, ...]
    sensitivity: dict[int, float] = field(default_factory=dict)
    lossless: dict[str, Any] = field(default_factory=dict)
    neuron_shares: dict[int, float] = field(default_factory=dict)
    bytes_up: int = 0


def choose_layers(fleet: Fleet, watch: Stopwatch, on_phase: OnPhase) -> Choice:
    """Steps 3 and 4: I_l of every layer as the n_k-weighted mean over the devices, the number N, and the N best
    layers."""
    fed = fleet.fed
    gal, available = fed.config.gal, fed.flat.layers
    if gal.selection == "all":
        return Choice(gal=available)
    choice = Choice(gal=())
    if gal.selection == "sensitive":
        with watch.phase("sensitivity"):
            sensitivity = _sensitivity(fleet, on_phase)
        choice.sensitivity = {layer: float(value) for layer, value in zip(available, sensitivity.tolist(), strict=True)}
        choice.bytes_up += SCALAR_BYTES * len(available) * len(fleet.sizes)
    by_rule = gal.count is None and gal.fraction is None
    if by_rule or gal.spectrum:
        with watch.phase("lossless"):
            choice.lossless = _lossless(fleet, on_phase) | {"decides": by_rule}
        choice.bytes_up += SCALAR_BYTES * len(choice.lossless["devices"])
    if gal.count is not None:
        count = gal.count
    elif gal.fraction is not None:
        count = max(1, round(gal.fraction * len(available)))
    else:
        count = choice.lossless["count"]
    if gal.selection == "sensitive":
        ranked = torch.tensor(list(choice.sensitivity.values()), dtype=torch.float64)
        choice.gal = layers.choose_gal(ranked, count, available)
    elif gal.selection == "random":
        choice.gal = tuple(sorted(stream(fed.config.seed, "gal").choice(available, size=count, replace=False).tolist()))
    else:
        choice.gal = available[:count] if gal.selection == "first" else available[-count:]
    return choice


def _told(answers: Iterator[Answer], name: str, total: int, on_phase: OnPhase) -> list[Answer]:
    """All answers; says how many of them are there."""
    found: list[Answer] = []
    on_phase(name, 0, total)
    for answer in answers:
        found.append(answer)
        on_phase(name, len(found), total)
    return found


def _sensitivity(fleet: Fleet, on_phase: OnPhase) -> Tensor:
    values = _told(fleet.sensitivities(), "sensitivity", len(fleet.sizes), on_phase)
    return layers.combine(values, fleet.sizes.tolist())[list(fleet.fed.flat.layers)]


def _asked(fleet: Fleet) -> list[int]:
    """The devices that take their spectrum."""
    config, devices = fleet.fed.config, len(fleet.sizes)
    asked = min(config.gal.lanczos_devices, devices)
    return sorted(stream(config.seed, "lossless").choice(devices, size=asked, replace=False).tolist())


def _sizes(fleet: Fleet, devices: Sequence[int]) -> list[int]:
    return fleet.sizes[list(devices)].tolist()


def _lossless(fleet: Fleet, on_phase: OnPhase) -> dict[str, Any]:
    chosen, default = _asked(fleet), fleet.fed.config.gal.default_share
    decisions = _told(fleet.decisions(chosen), "lossless", len(chosen), on_phase)
    count = lossless.combine_decisions(decisions, _sizes(fleet, chosen), len(fleet.fed.flat.layers), default)
    return {
        "found": any(decision.found for decision in decisions),
        "count": count,
        "default_share": default,
        "devices": [{"device": k, **d.to_record()} for k, d in zip(chosen, decisions, strict=True)],
    }


def neuron_shares(fleet: Fleet, gal: Sequence[int], watch: Stopwatch, on_phase: OnPhase) -> dict[int, float]:
    """The share of active rows in each local layer, by the rule of step 4 on that layer's own values (neurons.rule =
    "lossless"): the size-weighted mean of the devices' kept shares; where no gap is found, neurons.share."""
    local = [layer for layer in fleet.fed.flat.layers if layer not in set(gal)]
    chosen, default = _asked(fleet), fleet.fed.config.neurons.share

    def share(layer: int) -> float:
        kept = [default if d.share is None else d.share for d in fleet.decisions(chosen, layer)]
        return weighted_mean(kept, _sizes(fleet, chosen))

    with watch.phase("lossless"):
        return dict(zip(local, _told(map(share, local), "lossless by layer", len(local), on_phase), strict=True))
