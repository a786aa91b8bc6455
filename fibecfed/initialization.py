"""The initialization phase: layer sensitivities, the lossless rule, the GAL (steps 3 and 4), eager scores if asked
for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import layers, lossless
from .client import Client, Device
from .federation import Federation
from .losses import classification_loss
from .seeds import stream, torch_stream
from .server import weighted_mean
from .stopwatch import Stopwatch

OnPhase = Callable[[str, int, int], None]
SCALAR_BYTES = 8  # a sensitivity or a kept share travels as one float64


@dataclass
class Choice:
    """What the initialization phase decided, and why."""

    gal: tuple[int, ...]
    sensitivity: dict[int, float] = field(default_factory=dict)
    lossless: dict[str, Any] = field(default_factory=dict)
    neuron_shares: dict[int, float] = field(default_factory=dict)
    bytes_up: int = 0


def choose_layers(fed: Federation, client: Client, watch: Stopwatch, on_phase: OnPhase) -> Choice:
    """Steps 3 and 4: I_l of every layer as the n_k-weighted mean over the devices, the number N, and the N best
    layers."""
    gal, available = fed.config.gal, fed.flat.layers
    if gal.selection == "all":
        return Choice(gal=available)
    choice = Choice(gal=())
    if gal.selection == "sensitive":
        with watch.phase("sensitivity"):
            sensitivity = _sensitivity(fed, client, on_phase)
        choice.sensitivity = {layer: float(value) for layer, value in zip(available, sensitivity.tolist(), strict=True)}
        choice.bytes_up += SCALAR_BYTES * len(available) * len(fed.devices)
    by_rule = gal.count is None and gal.fraction is None
    if by_rule or gal.spectrum:
        with watch.phase("lossless"):
            choice.lossless = _lossless(fed, client, on_phase) | {"decides": by_rule}
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


def _sensitivity(fed: Federation, client: Client, on_phase: OnPhase) -> Tensor:
    norm = float(fed.config.gal.norm)
    values = []
    for done, device in enumerate(fed.devices):
        on_phase("sensitivity", done, len(fed.devices))
        batch = client.batch(fed.train, _one_batch(fed, device, fed.config.gal.sensitivity_batch))
        values.append(layers.sensitivity(fed.flat.model, batch, norm=norm, gamma=fed.config.gal.gamma))
    on_phase("sensitivity", len(fed.devices), len(fed.devices))
    every = layers.combine(values, fed.sizes.tolist())
    return every[list(fed.flat.layers)]


def _asked(fed: Federation) -> list[int]:
    """The devices that take their spectrum."""
    asked = min(fed.config.gal.lanczos_devices, len(fed.devices))
    return sorted(stream(fed.config.seed, "lossless").choice(len(fed.devices), size=asked, replace=False).tolist())


def _decision(fed: Federation, client: Client, k: int, span: slice | None = None) -> lossless.Decision:
    settings, seed = fed.config.gal, fed.config.seed
    batch = client.batch(fed.train, _one_batch(fed, fed.devices[k], settings.lanczos_batch))

    def loss() -> Tensor:
        return classification_loss(fed.flat.model, batch).mean()

    generator = torch_stream(seed, "lanczos", k)
    return lossless.device_decision(fed.flat, loss, steps=settings.lanczos_steps, generator=generator, span=span)


def _lossless(fed: Federation, client: Client, on_phase: OnPhase) -> dict[str, Any]:
    settings, chosen = fed.config.gal, _asked(fed)
    decisions = []
    for done, k in enumerate(chosen):
        on_phase("lossless", done, len(chosen))
        decisions.append(_decision(fed, client, k))
    on_phase("lossless", len(chosen), len(chosen))
    count = lossless.combine_decisions(
        decisions, [fed.devices[k].size for k in chosen], len(fed.flat.layers), settings.default_share
    )
    return {
        "found": any(decision.found for decision in decisions),
        "count": count,
        "default_share": settings.default_share,
        "devices": [{"device": k, **d.to_record()} for k, d in zip(chosen, decisions, strict=True)],
    }


def neuron_shares(fed: Federation, client: Client, watch: Stopwatch, on_phase: OnPhase) -> dict[int, float]:
    """The share of active rows in each local layer, by the rule of step 4 on that layer's own values (neurons.rule =
    "lossless"): the size-weighted mean of the devices' kept shares; where no gap is found, neurons.share."""
    local = [layer for layer in fed.flat.layers if layer not in set(client.gal)]
    chosen = _asked(fed)
    shares = {}
    with watch.phase("lossless"):
        for done, layer in enumerate(local):
            on_phase("lossless by layer", done, len(local))
            decisions = [_decision(fed, client, k, fed.flat.values(layer)) for k in chosen]
            kept = [fed.config.neurons.share if d.share is None else d.share for d in decisions]
            shares[layer] = weighted_mean(kept, [fed.devices[k].size for k in chosen])
    return shares


def _one_batch(fed: Federation, device: Device, size: int) -> np.ndarray:
    draw = stream(fed.config.seed, "one-batch", device.index)
    return draw.choice(device.train, size=min(size, device.size), replace=False)


def score_all(fed: Federation, client: Client, watch: Stopwatch, on_phase: OnPhase) -> None:
    """Steps 1, 2 and 5 before round 1, on every device (the paper's way; the lazy way scores at the first
    participation)."""
    total, done = int(fed.sizes.sum()), 0
    with watch.phase("score"):
        for device in fed.devices:
            client.score(device)
            done += device.size
            on_phase("score", done, total)
