"""Packing, loading and averaging adapters beside memcpy and safetensors itself, which checks nothing.

Our reference is not timed: its CRC is a loop in Python, hundreds of times slower, and would leave few rounds to others.
"""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fibecfed_kernels import WirePlan, aggregate

from .adapters import MODELS, Adapter, Model
from .comparison import Comparison, Provider, Work, relative_error

DTYPES = ("float32", "bfloat16", "int8")
DEVICES = 10
models = pytest.mark.parametrize("model", MODELS, ids=str)


@models
def test_pack(compare: Comparison, device: torch.device, model: Model) -> None:
    adapter = Adapter(model, device)
    plans = {dtype: WirePlan(adapter, range(model.layers), dtype) for dtype in DTYPES}  # type: ignore[arg-type]
    outs = {dtype: plan.pack(adapter, round=1, num_samples=1) for dtype, plan in plans.items()}
    tensors, copied = adapter.tensors(), torch.empty_like(adapter.data, device="cpu")

    def packed(dtype: str) -> Any:
        return lambda: plans[dtype].pack(adapter, round=1, num_samples=1, out=outs[dtype])

    def error(message: Tensor | bytes) -> float:
        raw = message if isinstance(message, bytes) else bytes(message.numpy())
        found = safetensors.torch.load(raw)
        return relative_error([found[name].float() for name in tensors], [t.double() for t in tensors.values()])

    providers = {f"fibecfed {dtype}": Provider(packed(dtype), error if dtype != "int8" else None) for dtype in DTYPES}
    providers["safetensors.torch.save"] = Provider(lambda: safetensors.torch.save(tensors), error)
    providers["memcpy, no message"] = Provider(lambda: copied.copy_(adapter.data))
    compare(Work("wire: pack", f"{model}, all layers", torch.float32, 8 * adapter.data.numel()), providers, 4e-3)


@models
def test_load(compare: Comparison, device: torch.device, model: Model) -> None:
    sent, adapter = Adapter(model, device), Adapter(model, device)
    plans = {dtype: WirePlan(adapter, range(model.layers), dtype) for dtype in DTYPES}  # type: ignore[arg-type]
    messages = {dtype: plan.pack(sent, round=1, num_samples=1) for dtype, plan in plans.items()}
    plain, views = safetensors.torch.save(sent.tensors()), adapter.tensors()
    host = sent.data.cpu()

    def loaded(dtype: str) -> Any:
        def load() -> Tensor:
            plans[dtype].load(messages[dtype], adapter)
            return adapter.data

        return load

    def by_safetensors() -> Tensor:
        for name, tensor in safetensors.torch.load(plain).items():
            views[name].copy_(tensor)
        return adapter.data

    def error(found: Tensor) -> float:
        return relative_error([found], [sent.data.double()])

    providers = {f"fibecfed {dtype}": Provider(loaded(dtype), error) for dtype in DTYPES}
    providers["safetensors.torch.load + copy (no checks)"] = Provider(by_safetensors, error)
    providers["memcpy, no message"] = Provider(lambda: adapter.data.copy_(host))
    compare(Work("wire: load", f"{model}, all layers", torch.float32, 8 * adapter.data.numel()), providers, 2e-2)


@models
def test_aggregate(compare: Comparison, device: torch.device, model: Model) -> None:
    adapters = [Adapter(model, device) for _ in range(DEVICES)]
    plan = WirePlan(adapters[0], range(model.layers))
    messages = [plan.pack(adapter, round=1, num_samples=i + 1) for i, adapter in enumerate(adapters)]
    weights = [float(i + 1) for i in range(DEVICES)]
    truth = sum(w * a.data.double() for w, a in zip(weights, adapters, strict=True)) / sum(weights)
    plain = [safetensors.torch.save(a.tensors()) for a in adapters]

    def ours() -> Tensor:
        return aggregate(plan, messages, weights, device=device)

    def by_hand() -> Tensor:
        """Decode all, then the weighted mean tensor by tensor, as FedAvg is mostly written."""
        states = [safetensors.torch.load(message) for message in plain]
        mean = {
            name: sum(w * s[name] for w, s in zip(weights, states, strict=True)) / sum(weights) for name in states[0]
        }
        return torch.cat([mean[e.name].flatten() for e in adapters[0].entries])

    def error(found: Tensor) -> float:
        return relative_error([found], [truth])

    numel = adapters[0].data.numel()
    moved = DEVICES * (4 * numel + 16 * numel)  # a message read, the float64 sum read and written
    providers = {
        "fibecfed": Provider(ours, error),
        "safetensors.torch.load + mean by tensor": Provider(by_hand, error),
    }
    compare(Work("wire: aggregate", f"{model}, {DEVICES} devices", torch.float32, moved), providers, 1e-5)
