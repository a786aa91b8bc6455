"""The mean of messages: against float64, in any order, one message alive at a time."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.timing import peak_bytes
from fibecfed_kernels import WireError, WirePlan, aggregate, use_backend
from fibecfed_kernels.wire.errors import ChecksumError, CountError, RoundError, WeightError
from fibecfed_kernels.wire.mean import CHUNK

from .bodies import bodies
from .wire_tools import DTYPES, make_flat, values_of

LAYERS = (0, 2)


def messages_of(dtype: str, count: int) -> tuple[WirePlan, list[torch.Tensor]]:
    flats = [make_flat(seed=seed, spread=0.4) for seed in range(count)]
    plan = WirePlan(flats[0], LAYERS, dtype)
    return plan, [plan.pack(flat, round=4, num_samples=1) for flat in flats]


def truth(plan: WirePlan, messages: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Σ w v / Σ w in float64, by fsum, which rounds once."""
    columns = torch.stack([values_of(plan.unpack(m), plan) for m in messages], 1).tolist()
    total = math.fsum(weights)
    return torch.tensor(
        [math.fsum(w * v for w, v in zip(weights, row, strict=True)) / total for row in columns], dtype=torch.float64
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "weights", [[1.0] * 5, [3, 1, 400, 12, 7], [0.1, 0.7, 1e-9, 1e9, 1 / 3], [1e-100, 1, 1, 1e100, 1]]
)
def test_mean_is_that_of_float64_rounded_once(dtype: str, weights: list[float]) -> None:
    plan, messages = messages_of(dtype, 5)
    mean = aggregate(plan, messages, weights)
    assert mean.dtype == torch.float32
    wanted = truth(plan, messages, weights)
    scale = torch.stack([values_of(plan.unpack(m), plan) for m in messages]).abs().amax(0)
    assert ((mean.double() - wanted).abs() <= wanted.abs() * 2.0**-24 + scale * 2.0**-49).all()
    with use_backend("reference"):
        assert torch.equal(aggregate(plan, messages, weights), mean)


@pytest.mark.parametrize("dtype", DTYPES)
@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=10, max_size=10))
def test_ten_identical_messages_average_to_themselves(dtype: str, weights: list[float]) -> None:
    plan, (message,) = messages_of(dtype, 1)
    assert torch.equal(aggregate(plan, [message] * 10, weights), values_of(plan.unpack(message), plan))


def test_sample_counts_average_the_same_in_any_order() -> None:
    plan, messages = messages_of("float32", 6)
    weights = [5, 1, 300, 17, 2, 64]
    forward = aggregate(plan, messages, weights)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 4, 1, 5, 3]):
        assert torch.equal(aggregate(plan, [messages[i] for i in order], [weights[i] for i in order]), forward)


def test_mean_goes_back_into_the_buffer() -> None:
    plan, messages = messages_of("float32", 2)
    into = make_flat(seed=9)
    plan.scatter_(aggregate(plan, messages, [1, 3]), into)
    wanted = (
        torch.stack([values_of(plan.unpack(m), plan) for m in messages]).double().mul(torch.tensor([[0.25], [0.75]]))
    )
    assert torch.equal(torch.cat([into.data[a:b] for a, b in plan.slices]), wanted.sum(0).float())


def test_one_message_at_a_time_is_alive() -> None:
    plan, (message, *_) = messages_of("float32", 1)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def arriving() -> Iterator[torch.Tensor]:
        nonlocal most
        for _ in range(5):
            gc.collect()
            buffer = message.clone()
            alive.add(buffer)
            most = max(most, len(alive))
            yield buffer
            del buffer

    aggregate(plan, arriving(), iter([1.0] * 5))
    assert most == 1


def test_a_bad_message_is_named_by_its_index() -> None:
    plan, messages = messages_of("float32", 3)
    messages[2][-1] ^= 1
    with pytest.raises(ChecksumError, match=r"^message 2: head\.8: ") as caught:
        aggregate(plan, messages, [1.0] * 3)
    assert (caught.value.index, caught.value.field) == (2, "head.8")
    with pytest.raises(RoundError, match=r"^message 0: metadata\.round: 4, wanted 5"):
        aggregate(plan, messages, [1.0] * 3, round=5)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e-300, 1e300])
def test_bad_weights_are_refused(weight: float) -> None:
    plan, messages = messages_of("float32", 2)
    with pytest.raises(WeightError) as caught:
        aggregate(plan, messages, [1.0, weight])
    assert (caught.value.index, caught.value.field) == (1, "weight")


@pytest.mark.parametrize(("messages", "weights"), [(0, 0), (0, 1), (1, 0), (2, 1), (1, 2)])
def test_counts_must_fit(messages: int, weights: int) -> None:
    plan, made = messages_of("float32", 2)
    with pytest.raises(CountError):
        aggregate(plan, iter(made[:messages]), iter([1.0] * weights))


def test_wire_errors_are_value_errors_and_survive_pickling() -> None:
    import pickle  # what multiprocessing and Ray do to an error; no message is ever pickled

    error = WeightError("weight", "nan, wanted more", 3)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, WireError)
    assert isinstance(again, ValueError)
    assert (str(again), again.field, again.index) == (str(error), "weight", 3)


def test_what_is_no_list_of_messages_or_of_numbers_is_refused_by_name() -> None:
    plan, messages = messages_of("float32", 3)
    for one in (messages[0], bytes(messages[0].numpy()), None):
        with pytest.raises(TypeError, match=rf"^buffers: {type(one).__name__}, wanted messages one by one"):
            aggregate(plan, one, [1.0])  # type: ignore[arg-type]
    for no_plan in (messages, None):
        with pytest.raises(TypeError, match=rf"^plan: {type(no_plan).__name__}, wanted a WirePlan"):
            aggregate(no_plan, messages)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^weights\[1\]: 'a', wanted a number"):
        aggregate(plan, messages, [1.0, "a", 2.0])  # type: ignore[list-item]
    for weight in ("3", True):
        with pytest.raises(TypeError, match=rf"^weights\[0\]: {weight!r}, wanted a number"):
            aggregate(plan, messages, [weight, 1.0, 1.0])  # type: ignore[list-item]
    for weights in (3.0, "123"):
        with pytest.raises(TypeError, match=r"^weights: "):
            aggregate(plan, messages, weights)  # type: ignore[arg-type]


def test_refused_messages_are_left_out_with_their_reason() -> None:
    plan, messages = messages_of("float32", 4)
    messages[1] = messages[1].clone()
    messages[1][-1] ^= 1
    seen: list[tuple[int, WireError]] = []
    mean = aggregate(plan, messages, [1.0, 50.0, 2.0, 3.0], on_refused=lambda *refused: seen.append(refused))
    assert torch.equal(mean, aggregate(plan, [messages[0], *messages[2:]], [1.0, 2.0, 3.0]))
    ((index, error),) = seen
    assert isinstance(error, ChecksumError)
    assert index == error.index == 1
    with pytest.raises(CountError, match="all 2 messages were refused"):
        aggregate(plan, [messages[1]] * 2, [1.0, 1.0], on_refused=lambda *_: None)
    with pytest.raises(WeightError):  # the caller's own mistake is not a device's
        aggregate(plan, messages, [1.0, math.nan, 1.0, 1.0], on_refused=lambda *_: None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_weights_they_are_the_messages_sample_counts(dtype: str) -> None:
    flats = [make_flat(seed=seed, spread=0.4) for seed in range(3)]
    plan = WirePlan(flats[0], LAYERS, dtype)
    counts = [3, 500, 41]
    messages = [plan.pack(flat, round=4, num_samples=n) for flat, n in zip(flats, counts, strict=True)]
    mean = aggregate(plan, messages)
    assert torch.equal(mean, aggregate(plan, messages, counts))
    with use_backend("reference"):
        assert torch.equal(mean, aggregate(plan, messages))
    nobody = plan.pack(flats[0], round=4, num_samples=0)
    with pytest.raises(WeightError, match=r"^message 3: metadata\.num_samples: 0\.0, wanted a finite number above 0"):
        aggregate(plan, [*messages, nobody])
    refused: list[int] = []
    assert torch.equal(mean, aggregate(plan, [nobody, *messages], on_refused=lambda i, _: refused.append(i)))
    assert refused == [0]


def test_memory_that_is_kept_is_filled_and_what_does_not_fit_is_refused() -> None:
    plan, messages = messages_of("bfloat16", 3)
    wanted = aggregate(plan, messages)
    sum, out = torch.full((plan.numel,), math.nan, dtype=torch.float64), torch.full((plan.numel,), math.nan)
    for _ in range(2):
        assert aggregate(plan, messages, accumulator=sum, out=out) is out
        assert torch.equal(out, wanted)
    assert torch.equal(aggregate(plan, messages, accumulator=sum), wanted)
    assert torch.equal(aggregate(plan, messages, out=out.fill_(math.nan)), wanted)
    for name, bad in (("accumulator", out), ("accumulator", sum[1:]), ("out", sum), ("out", out[1:])):
        with pytest.raises(ValueError, match=f"^{name}: "):
            aggregate(plan, messages, **{name: bad})


@bodies
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [None, [0.5 + i / 7 for i in range(37)]], ids=["counts", "given"])
def test_messages_of_a_list_are_added_together_to_the_same_bits(dtype: str, weights: Any, body: str) -> None:
    plan, messages = messages_of(dtype, count=37)  # more than are added at once, twice
    for i, byte in ((3, -1), (15, -1), (16, 40), (36, -1)):  # refused: values, and the header
        messages[i] = messages[i].clone()
        messages[i][byte] ^= 1
    found, refused = [], []
    for make in (list, tuple, iter):
        reasons: list[tuple[int, str]] = []
        with use_backend(body):
            found.append(
                aggregate(plan, make(messages), weights, on_refused=lambda i, e, r=reasons: r.append((i, str(e))))
            )
        refused.append(reasons)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    assert [i for i, _ in refused[0]] == [3, 15, 16, 36]
    assert refused[0] == refused[1] == refused[2]


def test_a_list_of_refused_messages_is_no_mean() -> None:
    plan, messages = messages_of("float32", count=2)
    for message in messages:
        message[-1] ^= 1
    with pytest.raises(CountError, match="all 2 messages were refused"):
        aggregate(plan, messages, on_refused=lambda *_: None)


def test_the_mean_of_many_values_is_divided_chunk_by_chunk() -> None:
    flat = make_flat(((0, (7, 40_001)), (1, (11, 3))), spread=0.4)
    plan = WirePlan(flat)
    message = plan.pack(flat, round=1, num_samples=1)
    assert plan.numel > 2 * CHUNK
    mean = aggregate(plan, [message] * 3, [1.0, 2.0, 4.0])
    assert torch.equal(mean, plan.gather(flat))


class Refilled(list[torch.Tensor]):
    """A list that is made as it is read, always in the same memory."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        buffer = self[0].clone()
        for i in range(len(self)):
            yield buffer.copy_(self[i])


def test_what_only_looks_like_a_list_is_taken_one_by_one() -> None:
    plan, messages = messages_of("float32", count=5)
    assert torch.equal(aggregate(plan, Refilled(messages)), aggregate(plan, messages))


def test_messages_that_must_be_copied_are_copied_one_at_a_time() -> None:
    flat = make_flat(((0, (16, 1000)),), spread=0.4)
    plan = WirePlan(flat)
    message = plan.pack(flat, round=1, num_samples=1)
    shifted = [torch.cat([torch.zeros(i % 3, dtype=torch.uint8), message])[i % 3 :] for i in range(12)]
    kept = {"accumulator": torch.empty(plan.numel, dtype=torch.float64), "out": torch.empty(plan.numel)}
    assert peak_bytes(lambda: aggregate(plan, shifted, **kept), torch.device("cpu")) < plan.nbytes + 4096
    assert torch.equal(kept["out"], plan.gather(flat))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("delta", [False, True])
def test_torchs_default_dtype_changes_nothing(dtype: str, delta: bool) -> None:
    flat = make_flat(spread=0.4)
    plan = WirePlan(flat, delta=delta)
    base = torch.zeros(plan.numel) if delta else None
    message = plan.pack(flat, round=1, num_samples=1, base=base)
    into = make_flat(seed=3)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        plan.read(message, base=base)
        plan.load(message, into, base=base)
        means = [aggregate(plan, make([message]), base=base) for make in (list, iter)]
        again = plan.pack(flat, round=1, num_samples=1, base=base)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, message)
    assert torch.equal(into.data, flat.data)
    for mean in means:
        assert mean.dtype == torch.float32
        assert torch.equal(mean, plan.gather(flat))


def test_a_default_device_changes_nothing() -> None:
    plan, messages = messages_of("int8", count=3)
    wanted = aggregate(plan, messages)
    with torch.device("meta"):
        assert plan.read(messages[0]).round == 4
        assert torch.equal(aggregate(plan, messages), wanted)


def test_a_weight_beyond_float64_is_refused_with_its_index() -> None:
    plan, messages = messages_of("float32", count=2)
    with pytest.raises(WeightError, match="inf, wanted a finite number"):
        aggregate(plan, messages, [1, 10**400])
