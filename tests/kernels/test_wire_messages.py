"""Messages that are as they should be: safetensors files, exact or within bounds, the same bytes every time."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load as safetensors_load

from fibecfed_kernels import Message, WirePlan, use_backend

from .bodies import bodies
from .wire_tools import DTYPES, SHAPES, Flat, Shapes, edited, join, make_flat, split, values_of

SMALLEST_MAXIMUM = 127 * 2.0**-126


def tolerance(flat: Flat, plan: WirePlan) -> torch.Tensor:
    """The largest error that each value may have on the wire."""
    values = plan.gather(flat)
    if levels := {"int8": 127, "int4": 7}.get(plan.dtype):
        bounds = [values[:0]]
        for entry in flat.entries:
            if entry.name in plan.names:
                row = entry.row_length if plan.dtype == "int8" else 64
                for line in flat.data[entry.offset : entry.offset + entry.numel].split(max(1, row)):
                    most = line.abs().max() if len(line) else line.sum()
                    step = most if most < levels * 2.0**-126 else most / levels / 2 * (1 + 1e-4)
                    bounds.append(step.expand(len(line)))
        return torch.cat(bounds)
    relative, subnormal = {"float32": (0.0, 0.0), "bfloat16": (2.0**-8, 0.0), "float16": (2.0**-11, 2.0**-25)}[
        plan.dtype
    ]
    return values.abs() * relative + subnormal


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_reads_what_unpack_gives(dtype: str, tmp_path: Path) -> None:
    flat = make_flat(spread=0.4)
    plan = WirePlan(flat, (0, 2), dtype)
    message = plan.pack(flat, round=12, num_samples=345)
    ours = plan.unpack(message)
    theirs = safetensors_load(message.numpy().tobytes())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
    path = tmp_path / "message.safetensors"
    path.write_bytes(message.numpy().tobytes())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "fibecfed"
    assert metadata["version"] == ("1.1" if dtype == "int4" else "1.0")
    assert metadata["schema"] == plan.fingerprint
    assert metadata["dtype"] == dtype
    assert json.loads(metadata["layers"]) == [0, 2]
    assert (int(metadata["round"]), int(metadata["num_samples"])) == (12, 345)
    assert len(metadata["crc32c"]) == 8 * len(ours)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_trip_stays_within_the_dtypes_error(dtype: str) -> None:
    flat, into = make_flat(spread=0.4), make_flat(seed=1)
    before = into.data.clone()
    plan = WirePlan(flat, (1, 0), dtype)
    message = plan.pack(flat, round=0, num_samples=1)
    assert message.shape == (plan.nbytes,)
    assert plan.load(message, into, round=0) == Message(0, 1)
    error = (plan.gather(into) - plan.gather(flat)).abs()
    assert (error <= tolerance(flat, plan)).all()
    assert torch.equal(values_of(plan.unpack(message), plan), plan.gather(into))
    travelled = torch.zeros(len(before), dtype=torch.bool)
    for start, stop in plan.slices:
        travelled[start:stop] = True
    assert torch.equal(into.data[~travelled], before[~travelled])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_is_written_and_the_same_each_time(dtype: str) -> None:
    flat = make_flat(spread=0.4)
    plan = WirePlan(flat, (0, 1, 2), dtype)
    first = plan.pack(flat, round=7, num_samples=8)
    out = torch.full((plan.nbytes,), 0xAB, dtype=torch.uint8)
    again = WirePlan(flat, [2, 1, 0], dtype).pack(make_flat(spread=0.4), round=7, num_samples=8, out=out)
    assert again is out
    assert torch.equal(first, again)
    with use_backend("reference"):
        assert torch.equal(first, plan.pack(flat, round=7, num_samples=8))


shapes = st.lists(
    st.tuples(
        st.sampled_from([None, 0, 1, 5]),
        st.one_of(
            st.tuples(),
            st.tuples(st.integers(0, 9)),
            st.tuples(st.integers(0, 70), st.sampled_from([0, 1, 3, 4, 8, 16, 31])),
            st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
            st.tuples(st.integers(1, 3), st.sampled_from([1000, 1025, 2500])),
        ),
    ),
    max_size=6,
)


@given(shapes=shapes, dtype=st.sampled_from(DTYPES), pick=st.sets(st.sampled_from([0, 1, 5])), seed=st.integers(0, 99))
def test_any_shapes_and_layers_round_trip(shapes: Shapes, dtype: str, pick: set[int], seed: int) -> None:
    flat, into = make_flat(shapes, seed, spread=0.4), make_flat(shapes, seed + 1)
    known = {layer for layer, _ in shapes if layer is not None}
    plan = WirePlan(flat, pick & known, dtype)
    chosen = [e for e in flat.entries if e.layer is None or e.layer in pick]
    assert plan.names == tuple(e.name for e in chosen)
    assert plan.numel == sum(e.numel for e in chosen) == sum(b - a for a, b in plan.slices)
    message = plan.pack(flat, round=1, num_samples=2)
    theirs = safetensors_load(message.numpy().tobytes())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in plan.unpack(message).items())
    plan.load(message, into)
    wanted = torch.cat([flat.data[:0], *(flat.data[a:b] for a, b in plan.slices)])
    assert ((plan.gather(into) - wanted).abs() <= tolerance(flat, plan)).all()
    with use_backend("reference"):
        assert torch.equal(message, plan.pack(flat, round=1, num_samples=2))
        plan.load(message, again := make_flat(shapes, seed + 1))
    assert torch.equal(into.data, again.data)


def test_gather_and_scatter_are_each_others_inverse() -> None:
    flat, into = make_flat(), make_flat(seed=1)
    plan = WirePlan(flat, (2,))
    untouched = into.data[: plan.slices[0][0]].clone()
    version = into.data._version
    plan.scatter_(plan.gather(flat), into)
    assert into.data._version > version
    assert torch.equal(plan.gather(into), plan.gather(flat))
    assert torch.equal(into.data[: plan.slices[0][0]], untouched)
    assert plan.slices == ((flat.entries[4].offset, len(flat.data)),)
    assert WirePlan(flat, (0, 2)).slices == ((0, 248), (flat.entries[4].offset, len(flat.data)))


def test_int8_rows_of_tiny_values_are_zeros_and_never_exceed_127() -> None:
    shapes = ((0, (6, 5)),)
    flat = make_flat(shapes)
    tiny = torch.tensor([0.0, 2.0**-149, SMALLEST_MAXIMUM * (1 - 2.0**-24), SMALLEST_MAXIMUM, 1e-30, 3.3e38])
    flat.data.view(6, 5)[:] = torch.tensor([1.0, -1.0, 0.5, -0.25, 0.0]) * tiny[:, None]
    tensors = WirePlan(flat, (0,), "int8").unpack(WirePlan(flat, (0,), "int8").pack(flat, round=0, num_samples=0))
    (name,) = (e.name for e in flat.entries)
    assert tensors[f"{name}.scale"].tolist()[:3] == [0.0, 0.0, 0.0]
    assert tensors[f"{name}.scale"][3] == 2.0**-126
    assert tensors[name][:3].eq(0).all()
    assert tensors[name][3:].tolist() == [[127, -127, 64, -32, 0]] * 3


@bodies
def test_int8_rounds_ties_to_even(body: str) -> None:
    flat = make_flat(((0, (2, 8)),))
    flat.data[:8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    flat.data[8:] = flat.data[:8] * -(2.0**-70)
    plan = WirePlan(flat, (0,), "int8")
    with use_backend(body):
        (values,) = (t for t in plan.unpack(plan.pack(flat, round=0, num_samples=0)).values() if t.dtype == torch.int8)
    assert values[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    assert torch.equal(values[1], -values[0])


def test_unpack_gives_views_and_only_bytes_are_copied() -> None:
    flat = make_flat()
    plan = WirePlan(flat, (0,))
    message = plan.pack(flat, round=0, num_samples=0)
    start, stop = message.data_ptr(), message.data_ptr() + len(message)
    assert all(start <= t.data_ptr() < stop for t in plan.unpack(message).values() if t.numel())
    wanted = plan.unpack(message)
    raw = message.numpy().tobytes()
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), message])[3:]
    for same in (raw, bytearray(raw), memoryview(raw), memoryview(bytearray(raw)), message.numpy(), shifted):
        assert all(torch.equal(t, wanted[name]) for name, t in plan.unpack(same).items())


def test_another_writers_header_of_the_same_meaning_is_read() -> None:
    flat = make_flat()
    plan = WirePlan(flat, (0, 1), "int8")
    message = plan.pack(flat, round=3, num_samples=4)
    header, data = split(message)
    backwards = dict(reversed(header.items()))
    indented = json.dumps(header, indent=2).encode()
    later = {**header, "__metadata__": {**header["__metadata__"], "version": "1.7", "note": "of a later version"}}
    for same in (join(backwards, data), join(indented + b" " * (-len(indented) % 8), data), join(later, data)):
        assert not torch.equal(same[: plan.nbytes], message)
        assert plan.read(same, round=3) == Message(3, 4)
        assert all(torch.equal(t, plan.unpack(message)[name]) for name, t in plan.unpack(same).items())


def test_the_fingerprint_follows_everything_that_must_agree() -> None:
    flat = make_flat()
    renamed = Flat(flat.data, (replace(flat.entries[0], name="other"), *flat.entries[1:]))
    reshaped = make_flat([(0, (31, 4)), *SHAPES[1:]])
    renumbered = tuple(replace(e, layer=5 if e.layer == 0 else e.layer) for e in flat.entries)
    plans = [
        WirePlan(flat, (0,)),
        WirePlan(flat, (1,)),
        WirePlan(flat, (0, 1)),
        WirePlan(flat, (0,), "int8"),
        WirePlan(renamed, (0,)),
        WirePlan(reshaped, (0,)),
        WirePlan(Flat(flat.data, renumbered), (5,)),
        WirePlan(Flat(flat.data, flat.entries, {"model": "tiny", "adapter": "r=4 α=16"}), (0,)),
        WirePlan(Flat(flat.data, flat.entries, {}), (0,)),
    ]
    assert len({plan.fingerprint for plan in plans}) == len(plans)
    assert WirePlan(make_flat(seed=5), (1, 0)).fingerprint == plans[2].fingerprint


def test_a_plan_keeps_no_reference_to_the_buffer() -> None:
    flat = make_flat()
    plan = WirePlan(flat, (0,))
    plan.pack(flat, round=0, num_samples=0)
    gone = weakref.ref(flat.data)
    del flat
    gc.collect()
    assert gone() is None


def test_threads_may_share_a_plan() -> None:
    flats = [make_flat(seed=seed) for seed in range(2)]
    plan = WirePlan(flats[0], (0, 1, 2))
    wanted = [plan.pack(flat, round=1, num_samples=seed) for seed, flat in enumerate(flats)]
    equal: list[bool] = []

    def work(seed: int) -> None:
        out = torch.empty(plan.nbytes, dtype=torch.uint8)
        equal.extend(
            torch.equal(plan.pack(flats[seed], round=1, num_samples=seed, out=out), wanted[seed]) for _ in range(50)
        )

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(equal) == 100
    assert all(equal)


def test_edited_with_no_change_is_still_accepted() -> None:
    """The tool that the refusal tests use makes good messages unless told otherwise."""
    flat = make_flat()
    plan = WirePlan(flat, (0,), "bfloat16")
    assert plan.read(edited(plan.pack(flat, round=1, num_samples=2), lambda header: None)) == Message(1, 2)


def test_a_parameter_that_needs_grad_can_be_packed_and_loaded() -> None:
    flat = make_flat()
    flat.data = torch.nn.Parameter(flat.data)
    plan = WirePlan(flat, (0,))
    message = plan.pack(flat, round=0, num_samples=0)
    version = flat.data._version
    plan.load(message, flat)
    assert flat.data._version > version
    assert not plan.gather(flat).requires_grad
