"""Run by test_wire_triton.py in a process with TRITON_INTERPRET=1: the Triton bodies against the reference."""

from __future__ import annotations

import torch

from fibecfed_kernels import WirePlan, aggregate, use_backend
from tests.kernels.wire_tools import DTYPES, SHAPES, Shapes, make_flat

SMALLEST_MAXIMUM = 127 * 2.0**-126


ODD = ((0, (3, 7)), (0, (5, 13)), (1, (1, 129)), (None, (9,)), (None, (1,)))  # of int4 the last byte is half a one


def check(dtype: str, shapes: Shapes) -> None:
    """Packing, loading and averaging by the Triton bodies give the reference's bits; what they must not touch stays."""
    flat, other = make_flat(shapes, spread=0.5), make_flat(shapes, seed=1, spread=0.5)
    if dtype == "int8" and shapes is SHAPES:
        flat.data[0], flat.data[1:31] = SMALLEST_MAXIMUM, 0.5 * SMALLEST_MAXIMUM  # the smallest row that is sent
        flat.data[31], flat.data[32:62] = SMALLEST_MAXIMUM * (1 - 2.0**-24), 1e-37  # the largest that is not
        flat.data[62:66] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # ties, where no value of the row is larger
        flat.data[66:93] = 0.0
    plan = WirePlan(flat, (0, 1), dtype)
    found = {}
    for backend in ("reference", "triton"):
        with use_backend(backend):
            messages = [plan.pack(f, round=5, num_samples=9) for f in (flat, other)]
            into, target = make_flat(shapes, seed=2), make_flat(shapes, seed=3)
            plan.load(messages[0], into)
            mean = aggregate(plan, messages, [0.1, 1e5 / 3])
            plan.scatter_(mean, target)
            found[backend] = (*messages, into.data, mean, plan.gather(target), target.data)
    for one, two in zip(found["reference"], found["triton"], strict=True):
        assert torch.equal(one, two), dtype


def check_special(dtype: torch.dtype) -> None:
    """Values around ties, the largest and smallest of each dtype, infinities: as torch's own cast."""
    from fibecfed_kernels.wire import triton as body

    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int32)
    bits[::3] &= -(2**13)  # many exact ties
    data = bits.view(torch.float32)
    data[:4] = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0])
    table = torch.tensor([[0, 0, 0, 1, 4096]])
    values = torch.empty(4096, dtype=dtype)
    body.wire_pack_(data, table, values, torch.empty(0))
    wanted = data.to(dtype)
    nan = data.isnan()
    assert torch.equal(values.isnan(), wanted.isnan())
    assert torch.equal(values[~nan].view(torch.int16), wanted[~nan].view(torch.int16))
    back = torch.empty(4096)
    body.wire_unpack_(values, torch.empty(0), table, back)
    assert torch.equal(back[~nan], wanted[~nan].float())


for name in DTYPES:
    check(name, SHAPES)
    check(name, ODD)
check_special(torch.bfloat16)
check_special(torch.float16)
print("equal")
