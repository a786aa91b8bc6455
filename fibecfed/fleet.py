"""The devices of a run, as the run sees them: a protocol, and the devices that are simulated in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from fibecfed_kernels import WirePlan

from . import curriculum, layers, lossless
from .client import Client, Device, TrainResult
from .evaluation import evaluate
from .federation import Federation
from .losses import classification_loss
from .seeds import stream, torch_stream
from .server import LocalStore, Server, Upload, plans, weighted_mean
from .stopwatch import Stopwatch

OnPhase = Callable[[str, int, int], None]


class Census(NamedTuple):
    """Who takes part. majority: accuracy of always naming the most frequent class, on the whole test set;
    personal_majority: on every device's own, with its own class. devices: {"size", "labels" (samples of each class)}.
    None and [] where the server may not know."""

    majority: float | None
    personal_majority: float | None
    devices: list[dict[str, Any]]


class Fleet(Protocol):
    """The devices 0 … K − 1, wherever they are. ``fed``: what the server has of model and data, ``store``: the initial
    local layers (and, of simulated devices, their own). Answers come one by one, in the order of the devices asked."""

    fed: Federation
    client: Client
    store: LocalStore

    @property
    def sizes(self) -> np.ndarray:
        """n_k of every device."""

    def samples(self) -> dict[str, int]:
        """The numbers of samples to train and to test on: "train", "test"."""

    def census(self) -> Census: ...

    def sensitivities(self) -> Iterator[Tensor]:
        """Step 3 on every device: I_l^k of every transformer block, float64 (blocks,)."""

    def decisions(self, asked: Sequence[int], layer: int | None = None) -> Iterator[lossless.Decision]:
        """Step 4 on these devices, over all LoRA values or one layer's."""

    def score_all(self) -> Iterator[int]:
        """Steps 1, 2 and 5 on every device; gives the number of samples of each that is done."""

    def divide(self, gal: Sequence[int], shares: Mapping[int, float]) -> None:
        """The layers that travel are chosen, and the shares of the others' rows where a rule found them."""

    def train(
        self, drawn: Sequence[int], broadcast: Tensor, t: int, share: float, watch: Stopwatch, on_phase: OnPhase
    ) -> Iterator[Upload]:
        """Steps 7 and 8 on the devices drawn."""

    def evaluate(self, server: Server, on_phase: OnPhase) -> dict[str, Any]:
        """Accuracies and metrics with what the server holds now: fields of a RoundRecord."""

    def last_uploads(self, plan: WirePlan) -> Iterator[Upload]:
        """The local layers of every device that ever trained."""

    def scores(self) -> np.ndarray:
        """The Fisher scores that the server may know, of all samples scored so far."""


class LocalFleet:
    """Devices that take turns on the one model of this process."""

    def __init__(self, fed: Federation, client: Client | None = None, store: LocalStore | None = None) -> None:
        self.fed, self.flat, self.config = fed, fed.flat, fed.config
        self.client = client or Client(fed.flat, fed.train, fed.test, fed.config, gal=fed.flat.layers)
        if store is not None:
            self.store = store
        self.down: WirePlan
        self.up: WirePlan

    @property
    def sizes(self) -> np.ndarray:
        return self.fed.sizes

    def samples(self) -> dict[str, int]:
        return {"train": len(self.fed.task.train), "test": len(self.fed.task.test)}

    def census(self) -> Census:
        fed = self.fed
        labels, classes = fed.task.train.labels, len(fed.task.classes)
        return Census(
            fed.majority,
            weighted_mean([fed.own_majority(device) for device in fed.devices], fed.sizes),
            [{"size": d.size, "labels": np.bincount(labels[d.train], minlength=classes).tolist()} for d in fed.devices],
        )

    # -- initialization phase ------------------------------------------------------------------------------------

    def sensitivities(self) -> Iterator[Tensor]:
        settings = self.config.gal
        for device in self.fed.devices:
            batch = self._one_batch(device, settings.sensitivity_batch)
            yield layers.sensitivity(self.flat.model, batch, norm=float(settings.norm), gamma=settings.gamma)

    def decisions(self, asked: Sequence[int], layer: int | None = None) -> Iterator[lossless.Decision]:
        settings = self.config.gal
        span = None if layer is None else self.flat.values(layer)
        for place in asked:
            device = self.fed.devices[place]
            batch = self._one_batch(device, settings.lanczos_batch)

            def loss(batch: Any = batch) -> Tensor:
                return classification_loss(self.flat.model, batch).mean()

            generator = torch_stream(self.config.seed, "lanczos", device.index)
            yield lossless.device_decision(
                self.flat, loss, steps=settings.lanczos_steps, generator=generator, span=span
            )

    def _one_batch(self, device: Device, size: int) -> dict[str, Tensor]:
        draw = stream(self.config.seed, "one-batch", device.index)
        samples = draw.choice(device.train, size=min(size, device.size), replace=False)
        return self.client.batch(self.fed.train, samples)

    def score_all(self) -> Iterator[int]:
        for device in self.fed.devices:
            self.client.score(device)
            yield device.size

    def divide(self, gal: Sequence[int], shares: Mapping[int, float]) -> None:
        self.client.gal = tuple(gal)
        if shares:
            self.client.neuron_share = dict(shares)
        self.down, self.up = plans(self.flat, gal, self.config.wire)
        residual = self.up.numel if self.config.wire.error_feedback else 0
        self.store = LocalStore(self.flat, gal, len(self.fed.devices), residual)

    # -- tuning phase --------------------------------------------------------------------------------------------

    def train(
        self, drawn: Sequence[int], broadcast: Tensor, t: int, share: float, watch: Stopwatch, on_phase: OnPhase
    ) -> Iterator[Upload]:
        for place in drawn:
            device = self.fed.devices[place]
            with watch.phase("pack"):
                self.down.load(broadcast, self.flat, round=t)
                base = self.down.gather(self.flat) if self.up.delta else None
                self.store.load(place)
            self._score_if_new(device, watch, on_phase)
            with watch.phase("train"):
                result = self._train(device, t, share, on_phase)
            with watch.phase("pack"):
                self.store.save(place)
                residual = self.store.residuals[place] if self.config.wire.error_feedback else None
                message = self.up.pack(self.flat, round=t, num_samples=device.size, base=base, residual=residual)
            yield Upload(place, message, result)

    def _score_if_new(self, device: Device, watch: Stopwatch, on_phase: OnPhase) -> None:
        if device.scores is None and self.client.needs_scores:
            with watch.phase("init"):
                done = 0

                def count(samples: int) -> None:
                    nonlocal done
                    done += samples
                    on_phase(f"score device {device.index}", done, device.size)

                self.client.score(device, count)

    def _train(self, device: Device, t: int, share: float, on_phase: OnPhase) -> TrainResult:
        settings = self.config.train
        total = settings.epochs * len(curriculum.select(range(device.size), share, settings.batch_size))
        done = 0

        def count(samples: int) -> None:
            nonlocal done
            done += samples
            on_phase(f"round {t}: device {device.index}", done, total)

        result = self.client.train(device, t, share, count)
        if not np.isfinite(result.loss):
            raise FloatingPointError(f"round {t}, device {device.index}: the loss is {result.loss}; lower train.lr")
        return result

    def evaluate(self, server: Server, on_phase: OnPhase) -> dict[str, Any]:
        return evaluate(self.fed, self.client, server, self.store, on_phase)

    def last_uploads(self, plan: WirePlan) -> Iterator[Upload]:
        for place, device in enumerate(self.fed.devices):
            if device.rounds > 0:
                self.store.load(place)
                yield Upload(place, plan.pack(self.flat, round=0, num_samples=device.size))

    def scores(self) -> np.ndarray:
        return np.concatenate([np.zeros(0), *(d.scores for d in self.fed.devices if d.scores is not None)])
