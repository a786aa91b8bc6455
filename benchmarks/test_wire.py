"""Packing, loading and averaging adapters beside memcpy and what federated code uses for it (``wire_peers``).

Our reference is not timed: its CRC is a loop in Python, hundreds of times slower, and would leave few rounds to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import pytest
import safetensors.torch
import torch
from torch import Tensor

from fibecfed_kernels import WirePlan, aggregate
from fibecfed_kernels.wire import WireDtype

from .adapters import LITTLE, MODELS, Adapter, Model
from .comparison import Comparison, Provider, Work, rehearsed, relative_error
from .wire_peers import (
    Tensors,
    Way,
    flower_fedavg,
    flower_pull,
    flower_push,
    flower_relay,
    has_flower,
    mean_by_hand,
    ways,
)

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

DTYPES: tuple[WireDtype, ...] = ("float32", "bfloat16", "int8", "int4")
DEVICES = 10
SHARES = {1: "all layers", 2: "half of the layers"}  # every n-th block travels: what is chosen lies scattered
models = pytest.mark.parametrize("model", MODELS, ids=str)
shares = pytest.mark.parametrize("every", SHARES, ids=SHARES.get)


def plans_of(adapter: Adapter, every: int) -> dict[WireDtype, WirePlan]:
    return {dtype: WirePlan(adapter, range(0, adapter.model.layers, every), dtype) for dtype in DTYPES}


def travelling(adapter: Adapter, plan: WirePlan) -> dict[str, Tensor]:
    """What a plan sends, by name: views of the adapter."""
    tensors = adapter.tensors()
    return {name: tensors[name] for name in plan.names}


def own(tensors: Tensors) -> Tensors:
    """The same in memory of their own, as the peers have them from an ordinary model."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def error_against(sent: Tensors) -> Callable[[Mapping[str, Tensor]], float]:
    """Largest error of tensors by name."""
    return lambda found: relative_error([found[name].float() for name in sent], [t.double() for t in sent.values()])


def pack_providers(model: Model, every: int, device: torch.device) -> tuple[dict[str, Provider], int]:
    """Everyone who packs what travels of an adapter; and its number of values."""
    adapter = Adapter(model, device)
    plans = plans_of(adapter, every)
    plan = plans["float32"]
    outs = {dtype: plan.pack(adapter, round=1, num_samples=1) for dtype, plan in plans.items()}  # pinned on CUDA
    sent = own(travelling(adapter, plan))
    error, values, copied = error_against(sent), adapter.data[: plan.numel], torch.empty(plan.numel)
    copied = copied.pin_memory() if device.type == "cuda" else copied  # as messages are

    def ours(dtype: WireDtype) -> Provider:
        def call() -> Tensor:
            return plans[dtype].pack(adapter, round=1, num_samples=1, out=outs[dtype])

        def wrong(message: Tensor) -> float:
            return error(safetensors.torch.load(message.numpy().tobytes()))

        return Provider(call, wrong if dtype in ("float32", "bfloat16") else None)

    def theirs(way: Way) -> Provider:
        return Provider(lambda: way.encode(sent), lambda message: error(way.decode(way.relay(message), list(sent))))

    providers = {f"fibecfed {dtype}": ours(dtype) for dtype in DTYPES}
    providers |= {name: theirs(way) for name, way in ways().items()}
    providers["memcpy, no message"] = Provider(lambda: copied.copy_(values))
    return providers, plan.numel


@models
@shares
def test_pack(compare: Comparison, device: torch.device, model: Model, every: int) -> None:
    providers, numel = pack_providers(model, every, device)
    little, _ = pack_providers(LITTLE, every, device)
    work = Work("wire: pack", f"{model}, {SHARES[every]}", torch.float32, 8 * numel)
    compare(work, rehearsed(providers, little), 4e-3)


def load_providers(model: Model, every: int, device: torch.device) -> tuple[dict[str, Provider], int]:
    """Everyone who loads what was packed; and its number of values."""
    sender, adapter = Adapter(model, device), Adapter(model, device)
    plans = plans_of(adapter, every)
    plan = plans["float32"]
    messages = {dtype: plan.pack(sender, round=1, num_samples=1) for dtype, plan in plans.items()}
    sent, views = own(travelling(sender, plan)), travelling(adapter, plan)
    host, values = sender.data[: plan.numel].cpu(), adapter.data[: plan.numel]
    host = host.pin_memory() if device.type == "cuda" else host
    error = error_against(sent)

    def loaded(_: object) -> float:
        found = error(views)
        adapter.data.zero_()  # who comes next must write it again
        return found

    def ours(dtype: WireDtype) -> Provider:
        return Provider(lambda: plans[dtype].load(messages[dtype], adapter), loaded)

    def theirs(way: Way) -> Provider:
        message = way.relay(way.encode(sent))

        def call() -> None:
            for name, tensor in way.decode(message, list(views)).items():
                views[name].copy_(tensor)

        return Provider(call, loaded)

    providers = {f"fibecfed {dtype}": ours(dtype) for dtype in DTYPES}
    providers["fibecfed float32, unpack: views, no copy"] = Provider(lambda: plan.unpack(messages["float32"]), error)
    providers |= {name: theirs(way) for name, way in ways().items()}
    providers["memcpy, no message"] = Provider(lambda: values.copy_(host))
    return providers, plan.numel


@models
@shares
def test_load(compare: Comparison, device: torch.device, model: Model, every: int) -> None:
    providers, numel = load_providers(model, every, device)
    little, _ = load_providers(LITTLE, every, device)
    tolerance = 8e-2  # int4's half step is 1/14 of a block's largest value
    work = Work("wire: load", f"{model}, {SHARES[every]}", torch.float32, 8 * numel)
    compare(work, rehearsed(providers, little), tolerance)


def aggregate_providers(model: Model, device: torch.device) -> tuple[dict[str, Provider], int]:
    """From messages as they arrived to the mean in each one's own form; and the number of values of a message."""
    adapters = [Adapter(model, device) for _ in range(DEVICES)]
    plan = WirePlan(adapters[0], range(model.layers))
    messages = [plan.pack(adapter, round=1, num_samples=i + 1) for i, adapter in enumerate(adapters)]
    counts = [i + 1 for i in range(DEVICES)]
    truth = torch.stack([n * a.data.double() for n, a in zip(counts, adapters, strict=True)]).sum(0) / sum(counts)
    error = error_against(adapters[0].tensors(truth))
    states = [own(a.tensors()) for a in adapters]
    files = [safetensors.torch.save(dict(state)) for state in states]

    kept = {"accumulator": torch.empty_like(truth), "out": torch.empty_like(adapters[0].data)}

    def ours(arrived: Callable[[], Iterable[Tensor]] = lambda: messages, **options: Tensor) -> Provider:
        return Provider(
            lambda: aggregate(plan, arrived(), counts, device=device, **options),
            lambda mean: error(adapters[0].tensors(mean)),
        )

    providers = {
        "fibecfed": ours(**kept),
        "fibecfed, one by one from a generator": ours(lambda: iter(messages), **kept),
        "fibecfed, new memory": ours(),
        "safetensors.torch.load + add_ by tensor": Provider(lambda: mean_by_hand(files, counts), error),
    }
    if has_flower():
        pushed = [flower_relay(flower_push(state, n)) for state, n in zip(states, counts, strict=True)]
        records = [flower_pull(message) for message in pushed]

        def of_record(mean: ArrayRecord) -> float:
            return error(mean.to_torch_state_dict())

        providers["Flower, pull + FedAvg"] = Provider(lambda: flower_fedavg(map(flower_pull, pushed)), of_record)
        providers["Flower, FedAvg of what was pulled"] = Provider(lambda: flower_fedavg(records), of_record)
    return providers, plan.numel


@models
def test_aggregate(compare: Comparison, device: torch.device, model: Model) -> None:
    providers, numel = aggregate_providers(model, device)
    little, _ = aggregate_providers(LITTLE, device)
    moved = (DEVICES + 1) * 4 * numel  # the messages read and the mean written
    work = Work("wire: aggregate", f"{model}, {DEVICES} devices", torch.float32, moved)
    compare(work, rehearsed(providers, little), 1e-5)
