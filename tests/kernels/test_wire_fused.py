"""wire_write_ and wire_read_, a whole message in one call: equal to the ops one by one, and safe with any numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fibecfed_kernels import WirePlan, use_backend

from .bodies import needs_cpp
from .wire_tools import DTYPES, make_flat

pytestmark = needs_cpp  # these ops have no other body
ops = torch.ops.fibecfed
CPU = torch.device("cpu")
SCHEMA = ("test_schema",)  # they have no fakes: nothing that is traced calls them
LARGE = ((0, (300, 2500)), (0, (40_000, 8)), (None, (7, 3)))  # enough for the work to be divided


def parts(dtype: str, delta: bool = False, large: bool = False) -> tuple[WirePlan, dict[str, Tensor]]:
    flat = make_flat(LARGE, spread=0.3) if large else make_flat(spread=0.3)
    plan = WirePlan(flat, (0,), dtype, delta=delta)
    ranges, header, places = plan._frame._constants
    table = plan._table("flat to message", CPU)
    message = torch.zeros(plan.nbytes, dtype=torch.uint8)
    given = {"data": flat.data, "table": table, "ranges": ranges, "header": header, "places": places}
    return plan, {**given, "message": message}


def write(of: dict[str, Tensor], round: int = 5, samples: int = 6, base: int = 7) -> int:
    names = ("data", "table", "ranges", "header", "places")
    return ops.wire_write_(*(of[name] for name in names), round, samples, base, of["message"])


def read(of: dict[str, Tensor], target: Tensor, round: int = -1, base: int = 7) -> tuple[int, int, int]:
    names = ("message", "table", "ranges", "header", "places")
    return ops.wire_read_(*(of[name] for name in names), round, base, 0.5, target)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: str, delta: bool) -> None:
    _, of = parts(dtype, delta)
    arguments = (*list(of.values())[:5], 1, 2, 3, of["message"].clone())
    torch.library.opcheck(ops.wire_write_.default, arguments, test_utils=SCHEMA)
    write(of)
    arguments = (of["message"], *list(of.values())[1:5], -1, 7, 0.0)
    torch.library.opcheck(ops.wire_read_.default, (*arguments, torch.zeros_like(of["data"])), test_utils=SCHEMA)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_message_in_one_call_is_that_of_the_ops_one_by_one(dtype: str, large: bool) -> None:
    plan, of = parts(dtype, large=large)
    flat = make_flat(LARGE, spread=0.3) if large else make_flat(spread=0.3)
    assert write(of) == -1
    if not large:  # the reference's checksum is slow
        with use_backend("reference"):
            assert torch.equal(of["message"], plan.pack(flat, round=5, num_samples=6))
    values, scales = plan._frame.typed(of["message"][plan._frame.header.nbytes :])
    one, two = torch.zeros_like(of["data"]), torch.zeros_like(of["data"])
    ops.wire_unpack_(values, scales, of["table"], one)
    assert read(of, two) == (1, 5, 6)
    assert torch.equal(one, two)
    sums = torch.full((2, plan.numel), 0.25, dtype=torch.float64)
    of["table"] = plan._table("values to message", CPU)
    ops.wire_accumulate_(sums[0], [values], [scales], of["table"], [0.5])
    assert read(of, sums[1]) == (1, 5, 6)
    assert torch.equal(sums[0], sums[1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = {**of, "table": plan._table("flat to message", CPU), "message": torch.zeros_like(of["message"])}
        assert write(again) == -1
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again["message"], of["message"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_unless_all_is_right(dtype: str) -> None:
    plan, of = parts(dtype, delta=True)
    write(of)
    target = torch.full_like(of["data"], 3.0)
    assert read(of, target, round=4)[0] == 0
    assert read(of, target, base=8)[0] == 0
    for at in (8, plan._frame.header.places["seal"].start, plan._frame.header.nbytes, plan.nbytes - 1):
        of["message"][at] ^= 1
        assert read(of, target)[0] == 0
        of["message"][at] ^= 1
    assert (target == 3.0).all()
    assert read(of, target[:0], round=5) == (1, 5, 6)
    assert read(of, target, round=5) == (1, 5, 6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_payload_that_is_not_finite_is_named(dtype: str) -> None:
    plan, of = parts(dtype)
    for entry in (1, 7):
        e = make_flat().entries[entry]
        kept = of["data"][e.offset].clone()
        of["data"][e.offset] = float("inf")
        name = f"{e.name}.scale" if dtype in ("int8", "int4") else e.name
        assert plan._frame.payloads[write(of)].name == name
        of["data"][e.offset] = kept


def spoilt(tensor: Tensor, at: int, value: int) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[at] = value
    return changed


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_numbers_that_reach_outside_are_refused(dtype: str) -> None:
    plan, of = parts(dtype)
    write(of)
    places, ranges, table = of["places"], of["ranges"], of["table"]
    huge = 2**62
    bad: list[dict[str, Tensor]] = [{"places": spoilt(places, 0, value)} for value in (-1, 5, huge)]
    for at in (1, 2, 3, 4, 5, 6, 7, 8, len(places) - 1):
        bad += [{"places": spoilt(places, at, value)} for value in (-2, 2**31, huge)]
    bad += [{"places": places[:9]}, {"places": places[:8]}, {"places": places[:0]}]
    bad += [{"ranges": spoilt(ranges, at, value)} for at in range(3) for value in (-1, 2**31, huge)]
    bad += [{"ranges": ranges[1:]}, {"header": of["header"][: plan._frame.header.nbytes - 8]}]
    columns = (0, 1, 3, 4) if dtype == "float32" else range(5)  # floats have no scales, whose rows could be wrong
    bad += [{"table": spoilt(table, at, value)} for at in columns for value in (-1, 2**31, huge)]
    bad += [{"table": table[1:]}, {"message": of["message"][:-1]}, {"message": torch.zeros(0, dtype=torch.uint8)}]
    bad += [{"message": torch.zeros(plan.nbytes + 9, dtype=torch.uint8)[1:-8]}]
    target = torch.full_like(of["data"], 3.0)
    for change in bad:
        for call in (lambda c: write({**of, **c}), lambda c: read({**of, **c}, target)):
            with pytest.raises(RuntimeError, match=r"places|ranges|table|message|header"):
                call(change)
    assert (target == 3.0).all()
