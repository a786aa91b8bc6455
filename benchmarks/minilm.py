"""The demo's model, MiniLM with LoRA, on its film reviews: what the suites of whole passes are about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from fibecfed.batches import Encoded, collate, cut, encode, length_buckets
from fibecfed.config import load_config
from fibecfed.federation import load_base, load_data

SAMPLES, BATCH = 256, 32
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """The demo's model with an adapter that has left zero, and some of its samples."""

    model: nn.Module
    data: Encoded
    device: torch.device

    def batch(self, indices: np.ndarray) -> Batch:
        return {key: value.to(self.device) for key, value in collate(self.data, indices).items()}

    @property
    def arrival(self) -> list[Batch]:
        return [self.batch(part) for part in cut(np.arange(SAMPLES), BATCH)]

    @property
    def middle(self) -> Batch:
        """One batch of samples of like, middling length."""
        return self.batch(length_buckets(self.data, BATCH).batches[SAMPLES // BATCH // 2])

    def flop(self, tokens: int) -> int:
        """Of a forward pass and a backward pass that only passes through: what no one can do without."""
        return 4 * tokens * sum(m.weight.numel() for m in self.model.modules() if isinstance(m, nn.Linear))

    @property
    def bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def lora(self) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if "lora_" in name]


@cache
def job(device: torch.device) -> Job:
    config = load_config(None, [f"device={device.type}", f"data.max_train={SAMPLES}"])
    task = load_data(config)
    loaded = load_base(config, len(task.classes))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:  # with B = 0 half of every gradient is zero
                parameter.normal_(std=0.02)
    return Job(loaded.model.eval(), encode(task.train, loaded.tokenizer, config.data.max_tokens), device)
