"""What one device does: score its samples, choose its neurons, train on the easy part, measure itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import curriculum, neurons
from .adapter import FlatAdapter
from .batches import Encoded, collate, length_buckets
from .capture import capture_fisher
from .config import RunConfig
from .losses import classification_loss
from .optim import MaskedAdamW, MaskedSGD
from .scoring import score_samples
from .seeds import stream, torch_seed, torch_stream
from .tree import evaluating


@dataclass
class Device:
    """One simulated device: which samples are its own, and what it has learnt about them."""

    index: int
    train: np.ndarray
    test: np.ndarray
    scores: np.ndarray | None = None  # Fisher score of each of `train`, None: never scored
    importance: Tensor | None = None  # smoothed Fisher sum of each row of the adapter, float32 (num_rows,)
    rounds: int = field(default=0)  # participations so far

    @property
    def size(self) -> int:
        return len(self.train)


class TrainResult(NamedTuple):
    """loss: mean over the samples seen. samples: number of samples seen (with repetition). rows: active rows."""

    loss: float
    samples: int
    rows: int


class Client:
    """The work of any device, on the one model of the process: whose turn it is only changes what the buffer holds."""

    def __init__(self, flat: FlatAdapter, train: Encoded, test: Encoded, config: RunConfig, gal: Sequence[int]) -> None:
        self.flat = flat
        self.model: nn.Module = flat.model
        self.train_set = train
        self.test_set = test
        self.config = config
        self.gal = tuple(gal)
        self.neuron_share: float | dict[int, float] = config.neurons.share
        self._rows = {layer: flat.rows(layer) for layer in flat.layers}

    # -- scoring -------------------------------------------------------------------------------------------------

    def score(self, device: Device, on_batch: Callable[[int], None] | None = None) -> None:
        """Steps 1 and 5 at the adapter the buffer holds now: Fisher scores of the samples, importance of the
        neurons."""
        buckets = length_buckets(self.train_set, self.config.eval.batch_size, device.train)
        with self.autocast():
            found = score_samples(
                self.model,
                (self.batch(self.train_set, bucket) for bucket in buckets.batches),
                labels=self.config.curriculum.labels,
                generator=torch_stream(self.config.seed, "labels", device.index, device.rounds),
                on_batch=on_batch,
            )
        device.scores = found.scores.cpu().numpy()[buckets.inverse]
        self._learn_importance(device, found.diagonal, device.size)

    def _learn_importance(self, device: Device, diagonal: Mapping[str, Tensor], samples: int) -> None:
        flat_diagonal = torch.zeros_like(self.flat.grad)
        for entry in self.flat.entries:
            if entry.name in diagonal:
                flat_diagonal[entry.offset : entry.offset + entry.numel] = diagonal[entry.name].flatten()
        rows = neurons.row_importance(flat_diagonal, self.flat.row_lengths) / samples
        device.importance = neurons.smooth(device.importance, rows.cpu(), self.config.neurons.momentum)

    def mask(self, device: Device) -> Tensor:
        """Rows this device updates: all of the GAL and the head, the best share of each local layer."""
        choice = self.config.neurons
        share = {"all": 1.0, "none": 0.0}.get(choice.selection, self.neuron_share)
        importance = device.importance
        if choice.selection == "random":
            draw = stream(self.config.seed, "neurons", device.index, device.rounds)
            importance = torch.from_numpy(draw.random(self.flat.num_rows, dtype=np.float32))
        elif importance is None:  # needed only where a share is chosen by Fisher information
            importance = torch.zeros(self.flat.num_rows)
        return neurons.row_mask(importance, self._rows, self.gal, share)

    @property
    def needs_scores(self) -> bool:
        """Whether anything in this configuration reads Fisher scores or neuron importances."""
        by_fisher = self.config.neurons.selection == "fisher" and set(self.gal) != set(self.flat.layers)
        return by_fisher or (self.config.curriculum.enabled and self.config.curriculum.order != "random")

    # -- training ------------------------------------------------------------------------------------------------

    def train(
        self, device: Device, round_: int, share: float, on_batch: Callable[[int], None] | None = None
    ) -> TrainResult:
        """Step 7: E local epochs over the first ``share`` of the curriculum order, GAL fully, local layers by mask."""
        settings, seed = self.config.train, self.config.seed
        mask = self.mask(device)
        order = self._order(device)
        chosen = curriculum.select(order, share, settings.batch_size)
        live = self.config.curriculum.live and self.needs_scores
        lengths = self.train_set.lengths[device.train] if settings.group_by_length else None
        lowest = neurons.lowest_active_layer(mask, self._rows)
        optimizer = self._optimizer(mask.to(self.flat.data.device), self._learning_rate(round_))
        total, samples = torch.zeros((), dtype=torch.float64, device=self.flat.data.device), 0
        diagonal: dict[str, Tensor] = {}
        with (
            _forked(self.flat.data.device),
            _training(self.model),
            nullcontext() if live else frozen_below(self.flat, lowest),
        ):
            torch.manual_seed(torch_seed(seed, "dropout", round_, device.index))
            for epoch in range(settings.epochs):
                shuffle = stream(seed, "shuffle", round_, device.index, epoch) if settings.shuffle else None
                for part in curriculum.batches(chosen, settings.batch_size, shuffle, lengths=lengths):
                    loss, fisher = self._step(optimizer, device.train[part], live)
                    total += loss * len(part)  # on the device: to read it would wait for every step
                    samples += len(part)
                    if fisher is not None and device.scores is not None:
                        device.scores[part] = fisher.scores.cpu().numpy()
                        for name, value in fisher.diagonal.items():
                            diagonal[name] = diagonal[name].add_(value) if name in diagonal else value
                    if on_batch is not None:
                        on_batch(len(part))
        if diagonal:
            self._learn_importance(device, diagonal, samples)
        device.rounds += 1
        return TrainResult(total.item() / max(1, samples), samples, int(mask.sum()))

    def _order(self, device: Device) -> np.ndarray:
        chosen = self.config.curriculum
        if not chosen.enabled or (device.scores is None and chosen.order != "random"):
            return np.arange(device.size)
        scores, seed = device.scores, torch_seed(self.config.seed, "order", device.index)
        if scores is None:
            scores = np.zeros(device.size)  # a random order does not look at them
        if chosen.stratified:
            return curriculum.stratified_order(scores, self.train_set.labels[device.train], chosen.order, seed=seed)
        return curriculum.order(scores, chosen.order, seed=seed)

    def _learning_rate(self, round_: int) -> float:
        settings = self.config.train
        if settings.lr_decay == "none":
            return settings.lr
        return settings.lr * (settings.rounds - round_ + 1) / settings.rounds

    def _optimizer(self, mask: Tensor, lr: float) -> MaskedAdamW | MaskedSGD:
        settings = self.config.train
        shared: dict[str, Any] = {
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
            "loraplus_lr_ratio": settings.loraplus_lr_ratio,
        }
        if settings.optimizer == "sgd":
            return MaskedSGD(self.flat, mask, lr, settings.momentum, **shared)
        return MaskedAdamW(self.flat, mask, lr, settings.betas, **shared)

    def _step(
        self, optimizer: MaskedAdamW | MaskedSGD, samples: np.ndarray, live: bool
    ) -> tuple[Tensor, capture_fisher | None]:
        batch = self.batch(self.train_set, samples)
        optimizer.zero_grad()
        fisher = capture_fisher(self.model, "mean") if live else None
        with fisher or nullcontext():
            with self.autocast():
                loss = classification_loss(self.model, batch).mean()
            loss.backward()
        optimizer.step()
        return loss.detach().double(), fisher

    # -- evaluation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, samples: np.ndarray) -> np.ndarray:
        """Predicted classes (len(samples),) of test samples, in their order, with the adapter the buffer holds now."""
        buckets = length_buckets(self.test_set, self.config.eval.batch_size, samples)
        predicted = []
        with evaluating(self.model), self.autocast():
            for bucket in buckets.batches:
                batch = self.batch(self.test_set, bucket)
                batch.pop("labels")
                predicted.append(self.model(**batch).logits.argmax(-1).cpu().numpy())
        return np.concatenate(predicted)[buckets.inverse]

    # -- the model's surroundings --------------------------------------------------------------------------------

    def batch(self, data: Encoded, samples: np.ndarray) -> dict[str, Tensor]:
        """The padded batch of some samples on the model's device."""
        return {key: value.to(self.flat.data.device) for key, value in collate(data, samples).items()}

    def autocast(self) -> torch.autocast:
        """bf16 autocast if the configuration asks for it."""
        return torch.autocast(self.flat.data.device.type, torch.bfloat16, enabled=self.config.autocast)


@contextmanager
def frozen_below(flat: FlatAdapter, layer: int | None) -> Iterator[None]:
    """Inside the block no parameter of a transformer block below ``layer`` needs a gradient, so the backward pass stops
    there (None: below the head). The time saved is what the lower blocks' backward would have cost."""
    below = [
        parameter
        for entry, parameter in flat.named_views()
        if entry.layer is not None and (layer is None or entry.layer < layer)
    ]
    for parameter in below:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in below:
            parameter.requires_grad_(True)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    model.train()
    try:
        yield
    finally:
        model.eval()


def _forked(device: torch.device) -> AbstractContextManager[None]:
    """Random states are put back, the CPU's and the device's own; by itself fork_rng initializes every other one."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng([device], device_type=device.type)
