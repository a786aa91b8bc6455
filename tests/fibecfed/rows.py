"""A small adapter whose gradients a test writes itself, and the same rows as torch parameters of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fibecfed import FlatAdapter


class Pair(nn.Module):
    """A LoRA pair, one of an embedding and a head, by their names: 24 rows of 1 to 6 values."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, 5, bias=False)})
        self.lora_embedding_A = nn.ParameterDict({"default": torch.randn(3, 4)})
        self.lora_embedding_B = nn.ParameterDict({"default": torch.randn(6, 3)})
        self.not_lora_B = nn.Linear(5, 2)
        self.head = nn.Linear(4, 3, bias=False)


def pair() -> FlatAdapter:
    torch.manual_seed(0)
    return FlatAdapter(Pair())


def gradients(flat: FlatAdapter, count: int) -> list[Tensor]:
    """Their norms go from 0.1 to 10 and back, so that some are clipped to 1 and some are not."""
    generator = torch.Generator().manual_seed(7)
    sizes = [10.0 ** (k % 3 - 1) for k in range(count)]
    return [size * torch.randn(flat.numel, generator=generator) / flat.numel**0.5 for size in sizes]


def some_rows(flat: FlatAdapter, seed: int = 1) -> Tensor:
    mask = torch.rand(flat.num_rows, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert 0 < mask.sum() < flat.num_rows
    return mask


def snapshot(flat: FlatAdapter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of the values and of the optimizer's state."""
    return {name: tensor.clone() for name, tensor in {"data": flat.data, **optimizer.state[flat.data]}.items()}


def assert_same(now: dict[str, Tensor], then: dict[str, Tensor]) -> None:
    assert now.keys() == then.keys()
    for name, tensor in now.items():
        assert torch.equal(tensor, then[name]), name


class TorchRows:
    """Every row as a torch parameter with an optimizer of its own, stepped only when the row is active."""

    def __init__(self, flat: FlatAdapter, kind: type[torch.optim.Optimizer], **hyper: Any) -> None:
        self.lengths = flat.row_lengths.tolist()
        self.rows = [nn.Parameter(part.clone()) for part in flat.data.detach().split(self.lengths)]
        self.optimizers = [kind([row], **hyper) for row in self.rows]  # type: ignore[call-arg]

    def step(self, grad: Tensor, mask: Tensor, max_grad_norm: float | None = None) -> Tensor | None:
        """One step of the active rows, clipped together by torch; returns their norm if clipped."""
        active = mask.nonzero().squeeze(1).tolist()
        parts = grad.split(self.lengths)
        for i in active:
            self.rows[i].grad = parts[i].clone()
        norm = None
        if max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_([self.rows[i] for i in active], max_grad_norm)
        for i in active:
            self.optimizers[i].step()
        return norm

    def values(self) -> Tensor:
        return torch.cat([row.detach() for row in self.rows])
