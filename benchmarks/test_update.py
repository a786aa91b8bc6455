"""Masked AdamW at several shares of active rows beside torch.optim.AdamW on the same tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fibecfed_kernels import masked_adamw_, row_layout, use_backend

from .adapters import LITTLE, MODELS, Adapter, Model
from .comparison import Comparison, Provider, Work, rehearsed

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
BYTES_PER_VALUE = 28  # value and both moments read and written, gradient read
TOLERANCE = 1e-6  # of a value, relative to the largest


class Case:
    """One adapter with gradients and a mask; every provider steps tensors of its own, again and again."""

    def __init__(self, model: Model, active: float, device: torch.device) -> None:
        self.adapter, self.active = Adapter(model, device), active
        self.grad = torch.randn_like(self.adapter.data)
        rows = self.adapter.rows
        self.mask = (
            (torch.rand(rows) < active).to(device) if active < 1 else torch.ones(rows, dtype=torch.bool).to(device)
        )
        self.layout = row_layout(self.adapter.entries, device)
        lengths = self.layout[:, 3].repeat_interleave(self.layout[:, 2])
        self.values = self.mask.repeat_interleave(lengths)  # which values are active
        self.start = self.adapter.data.clone()

    @property
    def bytes(self) -> int:
        return BYTES_PER_VALUE * int(self.values.sum())

    def masked(self, body: str | None = None) -> Provider:
        data = self.start.clone()
        m, v = torch.zeros_like(data), torch.zeros_like(data)
        steps = torch.zeros(self.mask.numel(), dtype=torch.int32, device=data.device)

        def step() -> Tensor:
            masked_adamw_(data, self.grad, m, v, steps, self.mask, self.layout, **HYPER)
            return data

        def reference() -> Tensor:
            with use_backend("reference"):
                return step()

        return Provider(reference if body == "reference" else step, self.error)

    def providers(self) -> dict[str, Provider]:
        """Ours and its peers: with every row active those that step all, else the one that masks gradients."""
        found = {"fibecfed": self.masked(), "fibecfed reference": self.masked("reference")}
        if self.active == 1.0:
            return found | {f"torch {kind}": self.torch_adamw(kind) for kind in ("fused", "foreach", "for-loop")}
        return found | {"grad.mul_(mask) + torch fused (does not freeze)": self.torch_adamw("fused", masks=True)}

    def torch_adamw(self, kind: str, masks: bool = False) -> Provider:
        """torch.optim.AdamW; with ``masks``, gradients of inactive rows zeroed first, which does not freeze them."""
        flat = self.start.clone()
        tensors = [t.requires_grad_() for t in self.adapter.tensors(flat).values()]
        grads = list(self.adapter.tensors(self.grad.clone()).values())
        keep = list(self.adapter.tensors(self.values.float()).values())
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = grad
        optimizer = torch.optim.AdamW(tensors, fused=kind == "fused", foreach=kind == "foreach", **HYPER)

        def step() -> Tensor:
            if masks:
                torch._foreach_mul_(grads, keep)
            optimizer.step()
            return flat

        return Provider(step, None if masks else self.error)

    def error(self, found: Tensor) -> float:
        """Against one float64 step of the active rows from the start: only right after the first call."""
        p, g = self.start.double(), self.grad.double()
        (beta1, beta2), lr = HYPER["betas"], HYPER["lr"]
        m, v = (1 - beta1) * g, (1 - beta2) * g.square()
        stepped = p * (1 - lr * HYPER["weight_decay"])
        stepped -= lr / (1 - beta1) * m / ((v / (1 - beta2)).sqrt() + HYPER["eps"])
        wanted = torch.where(self.values, stepped, p)
        return float((found.detach().double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("active", [1.0, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("model", [MODELS[0], replace(MODELS[1], r=16)], ids=str)
def test_masked_adamw(compare: Comparison, device: torch.device, model: Model, active: float) -> None:
    case = Case(model, active, device)
    little = Case(LITTLE, active, device)
    work = Work("update", f"{model}, {active:.0%} of the rows", torch.float32, case.bytes)
    rows = compare(work, rehearsed(case.providers(), little.providers()), TOLERANCE)
    assert all(row.ms50 is not None for row in rows if row.provider.startswith("fibecfed")), "ours is wrong"
