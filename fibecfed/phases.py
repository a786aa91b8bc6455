"""What is recorded of a run's phases: the initialization, each round, the end. Times in seconds, sizes in bytes.

The fields are plain JSON-shaped data (lists, dicts, numbers), so that what is read back equals what was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
BINS = 40


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` values lie between ``edges[i]`` and ``edges[i + 1]``."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What every phase costs: bytes at the wire by direction, wall seconds by activity (they sum to its duration)."""

    bytes_up: int
    bytes_down: int
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Scored(Cost):
    """What is kept of the samples' Fisher scores: quantiles {share: score} and a histogram over logarithmic bins.

    Both are empty where nothing is scored yet; ``score_histogram`` leaves scores of zero out, which have no logarithm.
    """

    score_quantiles: dict[float, float | None] = field(default_factory=dict)
    score_histogram: Histogram | None = None

    @classmethod
    def from_scores(cls, scores: ArrayLike, **fields: Any) -> Self:
        """The record with ``fields`` and what it keeps of ``scores``, (n,), n ≥ 0; values that are not finite are left
        out."""
        values = np.asarray(scores, dtype=np.float64)
        values = values[np.isfinite(values)]
        if values.size:
            quantiles = np.quantile(values, QUANTILES)
            fields["score_quantiles"] = dict(zip(QUANTILES, quantiles.tolist(), strict=True))
        positive = values[values > 0]
        if positive.size:
            low, high = np.log10(positive.min()), np.log10(positive.max())
            margin = 1e-3 if high > low else 0.5  # one value alone has a bin of its own around it
            edges = np.logspace(low - margin, high + margin, BINS + 1)
            counts = np.histogram(positive, edges)[0]
            fields["score_histogram"] = Histogram(edges.tolist(), counts.tolist())
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class InitRecord(Scored):
    """The initialization phase.

    gal: the layers that travel. rows_active, masks {layer: [active rows, rows]}: of one device. majority: accuracy of
    always naming the most frequent class; personal_majority: the same on every device's own test samples. sensitivity:
    {layer: I_l}, empty where it was not measured. lossless: the rule's decision, "found", "count" and for each device
    asked its spectrum, Lipschitz estimate and gap; empty where the number of layers was given. neuron_shares {layer:
    share of active rows}: by the rule in each local layer; empty where one share is given for all. devices: {"size",
    "labels" (samples of each class)}. With lazy scoring no scores are known yet.
    """

    gal: list[int]
    rows_active: int
    rows_total: int
    majority: float | None = None
    personal_majority: float | None = None
    sensitivity: dict[int, float | None] = field(default_factory=dict)
    lossless: dict[str, Any] = field(default_factory=dict)
    neuron_shares: dict[int, float] = field(default_factory=dict)
    masks: dict[int, list[int]] = field(default_factory=dict)
    devices: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RoundRecord(Cost):
    """One round; rounds count from 1. An accuracy is None where the round was not evaluated.

    devices: those drawn. loss: mean over the samples trained on, None where there was none. data_share: c(t). samples:
    trained on, repetitions counted. rows_active: mean over the devices taken. seconds: by activity (init, train, pack,
    aggregate, evaluate). modelled_seconds: communication over the configured link. elapsed: wall seconds since the
    start of the run, initialization included. global_metrics: beside the accuracy. refused {device: reason}: of whom
    the server took no message; where that is all, its values are those of the round before. What a refused device says
    is in neither loss, samples nor rows; what it sent is in the bytes. unevaluated {device: reason}: whose answers are
    missing in the accuracies.
    """

    round: int
    devices: list[int]
    loss: float | None
    data_share: float
    layers_active: int
    rows_active: int
    rows_total: int
    modelled_seconds: float
    elapsed: float
    samples: int | None = None
    global_accuracy: float | None = None
    personal_accuracy: float | None = None
    global_metrics: dict[str, float | None] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    unevaluated: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EndRecord(Scored):
    """The end of a run: final accuracies; bytes and seconds over initialization, rounds and the final upload.

    adapter: the exported PEFT folder, relative to the run's. refused {device: reason}: who trained, or may have, but
    whose local layers are not in it. The scores are those known by then: with lazy scoring, of the devices that were
    drawn.
    """

    global_accuracy: float | None
    personal_accuracy: float | None
    majority: float | None
    personal_majority: float | None
    adapter: str | None = None
    refused: dict[int, str] = field(default_factory=dict)


Phase = InitRecord | RoundRecord | EndRecord
PHASES: Mapping[str, type[Phase]] = {"init": InitRecord, "round": RoundRecord, "end": EndRecord}
