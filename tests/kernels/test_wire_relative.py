"""Messages relative to a base: differences, some rows only, error feedback; the same values as the whole ones have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as safetensors_load
from torch import Tensor

from fibecfed_kernels import Message, WirePlan, aggregate, use_backend
from fibecfed_kernels.wire import digest, relative
from fibecfed_kernels.wire.errors import BaseError

from .test_wire_messages import shapes
from .wire_tools import DTYPES, Flat, Shapes, make_flat

LAYERS = (0, 2)
KINDS = [{"delta": True}, {"sparse": True}, {"delta": True, "sparse": True}]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind))


def moved(seed: int, share: float = 0.5, of: Shapes | None = None) -> tuple[Flat, Flat, Tensor]:
    """An adapter as it was broadcast, as it is after training, and the rows that moved."""
    flat = make_flat(of, spread=0.4) if of is not None else make_flat(spread=0.4)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(sum(e.rows for e in flat.entries), generator=generator) < share
    lengths = torch.cat([torch.empty(0).long(), *(torch.full((e.rows,), e.row_length) for e in flat.entries)])
    active = rows.repeat_interleave(lengths)
    after = flat.data + active * 0.01 * torch.randn(len(flat.data), generator=generator)
    return flat, Flat(after, flat.entries), rows


def bound(plan: WirePlan, sent: Tensor) -> Tensor:
    """The largest error of each value on the wire: of what is sent, by dtype; scales are of a message's own blocks."""
    most = sent.abs().max() if len(sent) else torch.tensor(0.0)
    relative = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}.get(plan.dtype)
    if relative is not None:
        return sent.abs() * relative + 2.0**-25
    return most.expand_as(sent) / {"int8": 127, "int4": 7}[plan.dtype] / 2 * (1 + 1e-4)


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_trip_gives_the_values_within_the_error_of_what_is_sent(dtype: str, kind: dict[str, bool]) -> None:
    before, after, rows = moved(1)
    plan = WirePlan(before, LAYERS, dtype, **kind)
    base, wanted = plan.gather(before), plan.gather(after)
    message = plan.pack(after, round=3, num_samples=4, base=base, rows=rows if plan.sparse else None)
    assert len(message) < plan.nbytes if plan.sparse else len(message) == plan.nbytes
    into = make_flat(seed=8)
    outside = into.data.clone()
    assert plan.load(message, into, round=3, base=base) == plan.read(message, base=base) == Message(3, 4)
    found = plan.gather(into)
    sent = wanted - base if plan.delta else wanted
    assert ((found - wanted).abs() <= bound(plan, sent) + wanted.abs() * 2.0**-23 * plan.delta).all()
    if plan.sparse:
        still = found == base
        moves = (wanted != base).double().mean()
        assert still.double().mean() >= 1 - moves
        assert torch.equal(found[wanted == base], base[wanted == base]) or not plan.delta
    for start, stop in plan.slices:
        outside[start:stop] = into.data[start:stop]
    assert torch.equal(outside, into.data)
    with use_backend("reference"):
        again = plan.pack(after, round=3, num_samples=4, base=base, rows=rows if plan.sparse else None)
        assert torch.equal(message, again)
        plan.load(message, other := make_flat(seed=8), base=base)
    assert torch.equal(other.data, into.data)


def test_a_sparse_float32_message_is_the_whole_one_with_frozen_rows_left_out() -> None:
    before, after, rows = moved(2)
    whole, sparse = WirePlan(before, LAYERS), WirePlan(before, LAYERS, sparse=True)
    base = whole.gather(before)
    into, wanted = make_flat(seed=4), make_flat(seed=4)
    message = sparse.pack(after, round=0, num_samples=0, base=base, rows=rows)
    sparse.load(message, into, base=base)
    whole.load(whole.pack(after, round=0, num_samples=0), wanted)
    assert torch.equal(into.data, wanted.data)
    tensors = sparse.unpack(message, base=base)
    theirs = safetensors_load(message.numpy().tobytes())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors.items())
    assert tensors.keys() == theirs.keys() == {*sparse.names, *(f"{name}.rows" for name in sparse.names)}
    first = 0
    for e in before.entries:
        own = rows[first : first + e.rows].nonzero().squeeze(1)
        first += e.rows
        if e.name in sparse.names:
            assert tensors[f"{e.name}.rows"].tolist() == own.tolist()
            values = after.data[e.offset : e.offset + e.numel].view(e.shape)
            assert torch.equal(tensors[e.name], values[own])


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_is_that_of_the_whole_values(dtype: str, kind: dict[str, bool]) -> None:
    """Σ w v / Σ w in float64 over what each message alone loads as, before its rounding to float32."""
    weights = [3.0, 0.1, 40.0, 7.0]
    devices = [moved(seed) for seed in range(4)]
    before = devices[0][0]
    plan = WirePlan(before, LAYERS, dtype, **kind)
    base = plan.gather(before)
    messages, loaded = [], []
    for _, after, rows in devices:
        messages.append(plan.pack(after, round=0, num_samples=1, base=base, rows=rows if plan.sparse else None))
        plan.load(messages[-1], into := make_flat(), base=base)
        loaded.append(plan.gather(into).double())
    wanted = sum(w * v for w, v in zip(weights, loaded, strict=True)) / sum(weights)
    mean = aggregate(plan, messages, weights, base=base)
    assert ((mean.double() - wanted).abs() <= (wanted.abs() + base.abs()) * 2.0**-23).all()
    order = [2, 0, 3, 1]
    again = aggregate(plan, [messages[i] for i in order], [weights[i] for i in order], base=base)
    assert torch.equal(mean, again)
    with use_backend("reference"):
        assert torch.equal(mean, aggregate(plan, messages, weights, base=base))
    same = aggregate(plan, [messages[1]] * 3, [1.0, 5.0, 0.3], base=base)
    assert ((same.double() - loaded[1]).abs() <= (loaded[1].abs() + base.abs()) * 2.0**-24).all()


@given(of=shapes, kind=st.sampled_from(KINDS), dtype=st.sampled_from(DTYPES), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_any_shapes_and_rows_round_trip(of: Shapes, kind: dict[str, bool], dtype: str, share: float) -> None:
    before, after, rows = moved(0, share, of)
    plan = WirePlan(before, {layer for layer, _ in of if layer is not None}, dtype, **kind)
    base, wanted = plan.gather(before), plan.gather(after)
    message = plan.pack(after, round=1, num_samples=2, base=base, rows=rows if plan.sparse else None)
    plan.load(message, into := make_flat(of, 5), base=base)
    sent = wanted - base if plan.delta else wanted
    assert ((plan.gather(into) - wanted).abs() <= bound(plan, sent) + wanted.abs() * 2.0**-23 * plan.delta).all()
    assert len(safetensors_load(message.numpy().tobytes())) == len(plan.unpack(message, base=base))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=["delta", "delta-sparse"])
@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_error_feedback_loses_nothing_over_many_rounds(dtype: str, kind: dict[str, bool]) -> None:
    """Σ of what was received + residual = Σ of what was to be sent; without it the same part is lost each time."""
    before, after, _ = moved(3, share=1.0)
    plan = WirePlan(before, LAYERS, dtype, **kind)
    base, step = plan.gather(before), plan.gather(after) - plan.gather(before)
    residual, received, rounds = torch.zeros(plan.numel), torch.zeros(plan.numel, dtype=torch.float64), 40
    for i in range(rounds):
        generator = torch.Generator().manual_seed(i)
        some = torch.rand(sum(e.rows for e in before.entries), generator=generator) < 0.5 if plan.sparse else None
        message = plan.pack(after, round=i, num_samples=1, base=base, rows=some, residual=residual)
        plan.add_(received, message, 1.0, base=base)
        received -= base
    wanted = step.double() * rounds
    rounding = rounds * 2.0**-23 * plan.gather(after).abs()  # of base + difference in float32
    assert ((received + residual.double() - wanted).abs() <= rounding + 1e-5 * wanted.abs().max()).all()
    assert (received - wanted).abs().max() < 0.5 * rounds * step.abs().max()
    if not plan.sparse:
        bare = torch.zeros(plan.numel, dtype=torch.float64)
        plan.add_(bare, plan.pack(after, round=0, num_samples=1, base=base), float(rounds), base=base)
        bare -= rounds * base.double()
        assert (received - wanted).norm() < 0.2 * (bare - wanted).norm()


def test_the_residual_stays_when_nothing_was_sent() -> None:
    before, after, _ = moved(3)
    plan = WirePlan(before, LAYERS, "int8", delta=True)
    base, residual = plan.gather(before), torch.full((plan.numel,), 0.5)
    after.data[-1] = float("nan")
    with pytest.raises(ValueError, match=r"^head\.8: its difference to the base, with the residual, holds"):
        plan.pack(after, round=0, num_samples=0, base=base, residual=residual)
    assert (residual == 0.5).all()


def test_memory_that_is_written_is_shared_with_nothing_and_a_base_is_finite() -> None:
    before, after, _ = moved(3)
    plan = WirePlan(before, None, "int8", delta=True)
    base, residual, message = plan.gather(before), torch.zeros(plan.numel), {"round": 0, "num_samples": 1}
    for name, shared in (("flat.data", after.data), ("base", base)):
        kept = shared.clone()
        either = f"residual: shares memory with {name}|{name}: shares memory with residual"
        with pytest.raises(ValueError, match=either):
            plan.pack(after, **message, base=base, residual=shared)
        assert torch.equal(shared, kept)
    with torch.inference_mode():
        made_there = torch.zeros(plan.numel)
    with pytest.raises(ValueError, match=r"^residual: made in inference mode"):
        plan.pack(after, **message, base=base, residual=made_there)
    packed = plan.pack(after, **message, base=base, residual=residual)
    both = torch.zeros(plan.numel, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"accumulator: shares memory with out|out: shares memory with accumulator"):
        aggregate(plan, [packed], base=base, accumulator=both, out=both.view(torch.float32)[: plan.numel])
    base[3] = math.nan
    with pytest.raises(ValueError, match=r"^base: holds an infinite value or NaN"):
        plan.pack(after, **message, base=base)


def test_a_base_that_changes_while_messages_arrive_is_noticed() -> None:
    before, after, _ = moved(3)
    plan = WirePlan(before, delta=True)
    base = plan.gather(before)
    packed = plan.pack(after, round=0, num_samples=1, base=base)

    def arriving() -> Iterator[Tensor]:
        yield packed
        base.add_(1.0)
        yield packed

    with pytest.raises(BaseError, match=r"^message 1: metadata\.base"):
        aggregate(plan, arriving(), base=base)


def test_a_base_that_does_not_change_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, _ = moved(3)
    plan = WirePlan(before, delta=True)
    base = plan.gather(before)
    packed = plan.pack(after, round=0, num_samples=1, base=base)
    looked: list[int] = []

    def digest_of(values: Tensor) -> tuple[int, bool]:
        looked.append(values.numel())
        return digest.digest_of(values)

    monkeypatch.setattr(relative, "digest_of", digest_of)
    torch.testing.assert_close(aggregate(plan, [packed] * 3, base=base), plan.gather(after))
    assert looked == [plan.numel]


@kinds
def test_equal_messages_average_to_what_each_loads_as_and_a_huge_base_loses_nothing(kind: dict[str, bool]) -> None:
    before, after, _ = moved(4, share=1.0)
    before.data *= 1e15
    plan = WirePlan(before, LAYERS, "float32", **kind)
    base, rows = plan.gather(before), torch.ones(sum(e.rows for e in before.entries), dtype=torch.bool)
    message = plan.pack(after, round=0, num_samples=3, base=base, **({"rows": rows} if plan.sparse else {}))
    plan.load(message, into := make_flat(), base=base)
    for weights in (None, [0.3, 0.7, 0.1]):
        assert torch.equal(aggregate(plan, [message] * 3, weights, base=base), plan.gather(into))
    if not plan.delta:
        assert torch.equal(plan.gather(into), plan.gather(after))


@pytest.mark.parametrize(
    ("kind", "arguments", "match"),
    [
        ({}, {"base": 0}, "^base: given, wanted None: the plan is neither"),
        ({}, {"rows": 0}, "^rows: given, wanted None: the plan is neither"),
        ({}, {"residual": 0}, "^residual: given, wanted None: the plan is neither"),
        ({"delta": True}, {}, r"^base: None, wanted float32 \(\d+,\): the plan is delta or sparse"),
        ({"delta": True}, {"base": 1}, "^base: torch.float32"),
        ({"delta": True}, {"base": 0, "rows": 0}, "^rows: given, wanted None: the plan is not sparse"),
        ({"delta": True}, {"base": 0, "residual": 1}, "^residual: torch.float32"),
        ({"sparse": True}, {"base": 0}, r"^rows: NoneType, wanted torch.bool \(\d+,\): the plan is sparse"),
        ({"sparse": True}, {"base": 0, "rows": 1}, "^rows: torch.bool"),
        ({"sparse": True}, {"base": 0, "rows": 0, "residual": 0}, "^residual: given, wanted None: error feedback"),
        ({"sparse": True}, {"base": 0, "rows": 0, "out": 0}, "^out: given, wanted None: a sparse message"),
    ],
)
def test_arguments_that_do_not_fit_the_plan_are_refused(
    kind: dict[str, bool], arguments: dict[str, int], match: str
) -> None:
    """A number in place of an argument: a good one, so many values too long."""
    before, after, rows = moved(0)
    plan = WirePlan(before, LAYERS, **kind)
    good: dict[str, Any] = {
        "base": plan.gather(before),
        "rows": rows,
        "residual": torch.zeros(plan.numel),
        "out": torch.zeros(plan.nbytes, dtype=torch.uint8),
    }
    given = {name: torch.cat([good[name], good[name][:more]]) for name, more in arguments.items()}
    with pytest.raises(ValueError, match=match):
        plan.pack(after, round=0, num_samples=0, **given)
