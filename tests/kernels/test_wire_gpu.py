"""On a CUDA device: the same bytes, buffers and means as on the CPU."""

from __future__ import annotations

import pytest
import torch

from fibecfed_kernels import Message, WirePlan, aggregate, backend

from .wire_tools import DTYPES, Flat, make_flat

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_packs_loads_and_averages_as_the_cpu_does(dtype: str) -> None:
    flats = [make_flat(seed=seed, spread=0.4) for seed in range(3)]
    plan = WirePlan(flats[0], (0, 2), dtype)
    messages = [plan.pack(flat, round=2, num_samples=3) for flat in flats]
    on_gpu = [Flat(flat.data.cuda(), flat.entries) for flat in flats]
    assert backend("cuda") == "triton"
    for flat, wanted in zip(on_gpu, messages, strict=True):
        packed = plan.pack(flat, round=2, num_samples=3)
        assert packed.is_pinned()
        assert torch.equal(packed, wanted)
    into, wanted_into = Flat(on_gpu[0].data.clone(), flats[0].entries), Flat(flats[0].data.clone(), flats[0].entries)
    assert plan.load(messages[1], into) == plan.load(messages[1], wanted_into) == Message(2, 3)
    assert torch.equal(into.data.cpu(), wanted_into.data)
    mean = aggregate(plan, messages, [0.1, 3, 1 / 3], device="cuda")
    assert torch.equal(mean.cpu(), aggregate(plan, messages, [0.1, 3, 1 / 3]))
    plan.scatter_(mean, into)
    assert torch.equal(plan.gather(into), mean)
