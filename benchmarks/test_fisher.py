"""Fisher diagonal of a LoRA pair beside what one would write in torch. Who gives a wrong result gets no time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fibecfed_kernels import backend, lora_fisher_diag, use_backend

SHAPES = {"MiniLM": (32, 64, 384, 8), "RoBERTa-large": (8, 128, 1024, 8), "LLaMA-7B": (8, 512, 4096, 8)}  # N, T, d, r
Diagonals = tuple[Tensor, Tensor]


def ours(x: Tensor, h: Tensor, grad_h: Tensor, grad_y: Tensor) -> Diagonals:
    found = lora_fisher_diag(x, h, grad_h, grad_y)
    return found.a.diag, found.b.diag


def reference(*tensors: Tensor) -> Diagonals:
    with use_backend("reference"):
        return ours(*tensors)


def bmm(x: Tensor, h: Tensor, grad_h: Tensor, grad_y: Tensor) -> Diagonals:
    return torch.bmm(grad_h.mT, x).square().sum(0), torch.bmm(grad_y.mT, h).square().sum(0)


def einsum(x: Tensor, h: Tensor, grad_h: Tensor, grad_y: Tensor) -> Diagonals:
    pairs = ((grad_h, x), (grad_y, h))
    a, b = (torch.einsum("nto,nti->noi", grad, value).square().sum(0) for grad, value in pairs)
    return a, b


PROVIDERS: dict[str, Callable[..., Diagonals]] = {backend(): ours, "reference": reference, "bmm": bmm, "einsum": einsum}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_fisher_diag(benchmark: Any, shape: str, provider: str) -> None:
    samples, tokens, d, r = SHAPES[shape]
    x, h, grad_h, grad_y = (torch.randn(samples, tokens, features) for features in (d, r, r, d))
    call, truth = PROVIDERS[provider], bmm(x.double(), h.double(), grad_h.double(), grad_y.double())
    for found, wanted in zip(call(x, h, grad_h, grad_y), truth, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    benchmark.group = f"fisher, {shape}: N={samples} T={tokens} d={d} r={r} float32"
    benchmark(call, x, h, grad_h, grad_y)
