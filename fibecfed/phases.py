"""What is recorded of a run's phases: the initialization, each round, the end. Times in seconds, sizes in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Histogram:
    """``counts[i]`` values lie between ``edges[i]`` and ``edges[i + 1]``."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Spectrum:
    """One device's answer to the lossless rule: ascending eigenvalue estimates of its Hessian over ``dim`` directions.

    ``gap``: the directions m left out by the first gap above 4·``lipschitz``; None: there is no such gap.
    """

    device: int
    eigenvalues: tuple[float | None, ...]
    lipschitz: float | None
    gap: float | None
    dim: int
    seed: int | None = None


@dataclass(frozen=True)
class Lossless:
    """The lossless rule's answer: ``layers`` kept, ``share`` of the directions kept, and the devices' spectra.

    ``found`` is False where no device had a gap: ``share`` is then the configured one.
    """

    found: bool
    share: float | None
    layers: int
    devices: tuple[Spectrum, ...] = ()


@dataclass(frozen=True)
class DeviceData:
    """What lies on a device: number of training samples, and of each class."""

    size: int
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class InitRecord:
    """The initialization phase. ``sensitivity`` and ``masks`` (active rows, rows) are by layer; times in seconds.

    ``majority``: accuracy of always naming the test set's most frequent class; ``personal_majority``: of every device
    naming its own training data's, on its own test split. Scores are those known so far: with lazy scoring, none.
    """

    gal: tuple[int, ...]
    rows_active: int
    rows_total: int
    seconds: dict[str, float]
    bytes_up: int
    bytes_down: int
    majority: float | None = None
    personal_majority: float | None = None
    sensitivity: dict[int, float | None] = field(default_factory=dict)
    lossless: Lossless | None = None
    masks: dict[int, tuple[int, int]] = field(default_factory=dict)
    score_quantiles: dict[float, float | None] = field(default_factory=dict)
    score_histogram: Histogram | None = None
    devices: tuple[DeviceData, ...] = ()
    modelled_seconds: float = 0.0


@dataclass(frozen=True)
class RoundRecord:
    """One round; rounds count from 1. An accuracy is None where the round was not evaluated.

    ``seconds``: wall seconds by phase (init, train, pack, aggregate, evaluate). ``elapsed``: wall seconds since the
    start of the run, initialization included. ``modelled_seconds``: communication over the configured link. Bytes are
    those of this round. ``global_metrics``: Matthews correlation, F1, … beside the accuracy.
    """

    round: int
    devices: tuple[int, ...]
    loss: float | None
    data_share: float
    layers_active: int
    rows_active: int
    rows_total: int
    bytes_up: int
    bytes_down: int
    seconds: dict[str, float]
    modelled_seconds: float
    elapsed: float
    global_accuracy: float | None = None
    personal_accuracy: float | None = None
    global_metrics: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class EndRecord:
    """The end of a run: final accuracies, and totals over initialization, rounds and the final upload.

    ``adapter``: the exported PEFT folder, relative to the run's. Scores and masks are those known at the end: with lazy
    scoring of the devices that were drawn.
    """

    global_accuracy: float | None
    personal_accuracy: float | None
    majority: float | None
    personal_majority: float | None
    bytes_up: int
    bytes_down: int
    seconds: dict[str, float]
    adapter: str | None = None
    elapsed: float | None = None
    score_quantiles: dict[float, float | None] = field(default_factory=dict)
    score_histogram: Histogram | None = None
    masks: dict[int, tuple[int, int]] = field(default_factory=dict)


Phase = InitRecord | RoundRecord | EndRecord
PHASES: Mapping[str, type[Phase]] = {"init": InitRecord, "round": RoundRecord, "end": EndRecord}
