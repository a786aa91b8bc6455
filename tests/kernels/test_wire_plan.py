"""Arguments that a WirePlan cannot take: each refused by its name, before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fibecfed_kernels import WirePlan, aggregate
from fibecfed_kernels.wire.errors import WeightError

from .wire_tools import Flat, make_flat

SMALL = ((0, (2, 3)), (1, (4, 2)), (None, (2,)))


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "layers: no block 7", {"layers": (0, 7)}),
        (ValueError, "layers: no block -1", {"layers": (-1,)}),
        (ValueError, "each block once", {"layers": (0, 0)}),
        (TypeError, "block indices", {"layers": (True,)}),
        (TypeError, r"layers: \(0.0,\), wanted block indices, some of \[0, 1\]", {"layers": (0.0,)}),
        (TypeError, "block indices; choose from a mask", {"layers": torch.tensor([False, True])}),
        (TypeError, "layers: 0, wanted block indices", {"layers": 0}),
        (TypeError, "layers: 'all', wanted block indices", {"layers": "all"}),
        (ValueError, "dtype: 'float64', wanted one of the names 'float32', 'bfloat16'", {"dtype": "float64"}),
        (ValueError, "dtype: torch.int8, wanted one of the names 'float32', 'bfloat16'", {"dtype": torch.int8}),
        (TypeError, "flat: NoneType, wanted a FlatAdapter", {"flat": None}),
        (TypeError, "flat.data: ndarray, wanted a torch.Tensor", {"flat": Flat(torch.zeros(3).numpy(), ())}),  # type: ignore[arg-type]
        (TypeError, "delta: 'no', wanted True or False", {"delta": "no"}),
        (TypeError, "sparse: 1, wanted True or False", {"sparse": 1}),
    ],
)
def test_plans_that_cannot_be_are_refused(error: type[Exception], match: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        WirePlan(**{"flat": make_flat(SMALL), "layers": (0,), **arguments})


def test_flat_buffers_that_do_not_fit_are_refused() -> None:
    flat, other = make_flat(SMALL), make_flat(SMALL[:2])
    plan = WirePlan(flat, (0,))
    message = plan.pack(flat, round=0, num_samples=0)
    wrong = {
        "flat.data": [other, Flat(flat.data.double(), flat.entries), Flat(flat.data.repeat(2)[::2], flat.entries)],
        "flat.entries": [Flat(flat.data, make_flat(((1, (2, 3)), *SMALL[1:])).entries)],
        "flat.identity": [Flat(flat.data, flat.entries, {"model": "another"})],
    }
    for field, flats in wrong.items():
        for bad in flats:
            for use in (lambda f: plan.pack(f, round=0, num_samples=0), lambda f: plan.load(message, f), plan.gather):
                with pytest.raises(ValueError, match=field):
                    use(bad)
    with pytest.raises(ValueError, match="stands twice"):
        WirePlan(Flat(flat.data, tuple(replace(e, name="same") for e in flat.entries)), ())
    with pytest.raises(ValueError, match="must be contiguous"):
        WirePlan(Flat(flat.data, flat.entries[1:]), ())


def test_arguments_that_do_not_fit_are_refused() -> None:
    flat = make_flat(SMALL)
    plan = WirePlan(flat, (0,))
    for field, value in (("round", -1), ("round", 10**16), ("num_samples", -1)):
        with pytest.raises(ValueError, match=f"^{field}: "):
            plan.pack(flat, **{"round": 0, "num_samples": 0, field: value})
    for value in (True, 1.5, "1", None):
        with pytest.raises(TypeError, match=rf"^round: {value!r}, wanted an integer"):
            plan.pack(flat, round=value, num_samples=0)
    for use in (lambda f: plan.pack(f, round=0, num_samples=0), plan.gather):
        with pytest.raises(TypeError, match=r"^flat: dict, wanted a FlatAdapter"):
            use({})
    whole = torch.zeros(2 * plan.nbytes + 8, dtype=torch.uint8)
    for out in (whole, whole[: 2 * plan.nbytes : 2], whole[1 : plan.nbytes + 1], torch.zeros(plan.nbytes)):
        with pytest.raises(ValueError, match=r"^out: "):
            plan.pack(flat, round=0, num_samples=0, out=out)
    for buffer in ("text", 5, None, torch.zeros(9), torch.zeros(3, 3, dtype=torch.uint8)):
        with pytest.raises(TypeError, match=r"^buffer: "):
            plan.read(buffer)
    with pytest.raises(TypeError, match=r"^out: list, wanted a contiguous uint8 tensor"):
        plan.pack(flat, round=0, num_samples=0, out=[1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^values: list, wanted a torch.Tensor"):
        plan.scatter_([1.0], flat)  # type: ignore[arg-type]
    message, sum = plan.pack(flat, round=0, num_samples=0), torch.zeros(plan.numel, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"^sum: list, wanted a torch.Tensor"):
        plan.add_([1.0], message, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^weight: 'x', wanted a number"):
        plan.add_(sum, message, "x")  # type: ignore[arg-type]
    with pytest.raises(WeightError, match=r"^weight: nan"):
        plan.add_(sum, message, float("nan"))
    assert not sum.any()
    for values in (torch.zeros(plan.numel + 1), torch.zeros(plan.numel, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"^values: "):
            plan.scatter_(values, flat)


def test_all_layers_travel_unless_some_are_chosen() -> None:
    flat = make_flat(SMALL)
    assert WirePlan(flat).layers == (0, 1)
    assert WirePlan(flat).fingerprint == WirePlan(flat, [1, 0]).fingerprint


def test_an_adapter_that_can_tell_is_asked_whether_its_model_still_uses_the_buffer() -> None:
    class Left(Flat):
        def check(self) -> None:
            raise RuntimeError("left the buffer")

    flat = make_flat(SMALL)
    plan = WirePlan(flat)
    message, values, left = plan.pack(flat, round=0, num_samples=0), plan.gather(flat), Left(flat.data, flat.entries)
    for use in (
        lambda: plan.pack(left, round=0, num_samples=0),
        lambda: plan.load(message, left),
        lambda: plan.gather(left),
        lambda: plan.scatter_(values, left),
    ):
        with pytest.raises(RuntimeError, match="left the buffer"):
            use()


def test_what_is_written_counts_as_changed() -> None:
    """So that autograd refuses to use what it saved before."""
    flat = make_flat(SMALL)
    plan = WirePlan(flat)
    out = torch.empty(plan.nbytes, dtype=torch.uint8)
    sum, mean = torch.zeros(plan.numel, dtype=torch.float64), torch.empty(plan.numel)
    for written, use in (
        (out, lambda: plan.pack(flat, round=0, num_samples=1, out=out)),
        (sum, lambda: plan.add_(sum, out, 1.0)),
        (mean, lambda: aggregate(plan, [out], out=mean)),
        (flat.data, lambda: plan.load(out, flat)),
    ):
        before = written._version
        use()
        assert written._version > before


def test_entries_that_are_a_list_are_looked_at_every_time() -> None:
    flat = make_flat(SMALL)
    plan = WirePlan(flat)
    entries = list(flat.entries)
    other = Flat(flat.data, entries)  # type: ignore[arg-type]
    plan.gather(other)
    entries[0], entries[1] = entries[1], entries[0]
    with pytest.raises(ValueError, match=r"^flat.entries: not those that the plan was made for"):
        plan.gather(other)
