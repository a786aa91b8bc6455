"""Masked AdamW at several shares of active rows beside torch.optim.AdamW on the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fibecfed_kernels import Entry, backend, masked_adamw_, row_layout

SHAPES = [(8, 1024), (1024, 8)] * 48  # RoBERTa-large, r = 8, query and value: A and B of 48 modules


def entries() -> list[Entry]:
    found, offset = [], 0
    for i, shape in enumerate(SHAPES):
        found.append(Entry(f"p{i}", shape, offset, i // 4))
        offset += found[-1].numel
    return found


@pytest.mark.parametrize("active", [1.0, 0.25, 0.1])
def test_masked_adamw(benchmark: Any, active: float) -> None:
    table = entries()
    numel, rows = sum(e.numel for e in table), sum(e.rows for e in table)
    data, grad = torch.randn(numel), torch.randn(numel)
    m, v, steps = torch.zeros(numel), torch.zeros(numel), torch.zeros(rows, dtype=torch.int32)
    mask = torch.rand(rows) < active if active < 1 else torch.ones(rows, dtype=torch.bool)
    benchmark.group = f"AdamW, RoBERTa-large r=8: {numel} values in {len(SHAPES)} tensors"
    benchmark.extra_info["body"] = backend()
    benchmark(masked_adamw_, data, grad, m, v, steps, mask, row_layout(table), lr=1e-3)


@pytest.mark.parametrize("kind", ["fused", "foreach", "for-loop"])
def test_torch_adamw(benchmark: Any, kind: str) -> None:
    tensors = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor)
    optimizer = torch.optim.AdamW(tensors, lr=1e-3, fused=kind == "fused", foreach=kind == "foreach")
    benchmark.group = f"AdamW, RoBERTa-large r=8: {sum(t.numel() for t in tensors)} values in {len(SHAPES)} tensors"
    benchmark(optimizer.step)
