"""Messages relative to a base: what is refused, each by a crafted message, every cut and every flipped bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fibecfed_kernels import Message, WireError, WirePlan, aggregate
from fibecfed_kernels.wire import errors

from .wire_tools import Flat, edited, join, make_flat, split

SMALL = ((0, (4, 3)), (1, (4, 2)), (None, (2,)))
NAME = "block.0.0.weight"


def small(dtype: str = "float32", **kind: bool) -> tuple[WirePlan, torch.Tensor, torch.Tensor]:
    """A plan, a message of it that carries rows 0, 2 and 3 of the first parameter and row 1 of the head, the base."""
    before = make_flat(SMALL, spread=0.2)
    after = Flat(before.data + 0.1, before.entries)
    plan = WirePlan(before, (0,), dtype, **(kind or {"sparse": True}))
    base = plan.gather(before)
    rows = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1, 0, 1]).bool()
    options = {"rows": rows} if plan.sparse else {}
    return plan, plan.pack(after, round=6, num_samples=77, base=base, **options), base


def with_rows(message: torch.Tensor, indices: list[int]) -> torch.Tensor:
    """The message with other indices and checksums that fit."""
    header, data = split(message)
    raw = torch.tensor(indices, dtype=torch.int32).numpy().tobytes()
    return join(header, raw + data[len(raw) :])


@pytest.mark.parametrize("indices", [[0, 3, 2, 1], [2, 2, 3, 1], [0, 2, 4, 1], [-1, 2, 3, 1], [0, 2, 2**31 - 1, 1]])
def test_rows_that_do_not_ascend_or_are_beyond_are_refused(indices: list[int]) -> None:
    plan, message, base = small()
    assert plan.read(with_rows(message, [0, 1, 2, 0]), base=base) == Message(6, 77)
    into = make_flat(SMALL)
    kept = into.data.clone()
    bad = with_rows(message, indices)
    with pytest.raises(errors.RowsError, match=r"wanted ascending rows from 0") as caught:
        plan.load(bad, into, base=base)
    assert caught.value.field == f"{NAME}.rows"
    assert torch.equal(into.data, kept)
    with pytest.raises(errors.RowsError, match=r"^message 1: "):
        aggregate(plan, [message, bad], [1.0, 1.0], base=base)


@pytest.mark.parametrize(
    ("kind", "field", "edit"),
    [
        (errors.NamesError, f"{NAME}.rows", lambda h: h.pop(f"{NAME}.rows")),
        (errors.NamesError, NAME, lambda h: h.pop(NAME)),
        (errors.ShapeError, f"{NAME}.rows.shape", lambda h: h[f"{NAME}.rows"].update(shape=[5])),
        (errors.ShapeError, f"{NAME}.rows.shape", lambda h: h[f"{NAME}.rows"].update(shape=[2**62])),
        (errors.ShapeError, f"{NAME}.rows.shape", lambda h: h[f"{NAME}.rows"].update(shape=[-1])),
        (errors.ShapeError, f"{NAME}.rows.shape", lambda h: h[f"{NAME}.rows"].update(shape=[True])),
        (errors.ShapeError, f"{NAME}.rows.shape", lambda h: h[f"{NAME}.rows"].update(shape=[3, 1])),
        (errors.ShapeError, f"{NAME}.rows.shape", lambda h: h.update({f"{NAME}.rows": "x"})),
        (errors.OffsetsError, f"{NAME}.rows.data_offsets", lambda h: h[f"{NAME}.rows"].update(shape=[2])),
        (errors.ShapeError, f"{NAME}.shape", lambda h: h[NAME].update(shape=[3, 4])),
        (errors.DtypeError, f"{NAME}.rows.dtype", lambda h: h[f"{NAME}.rows"].update(dtype="I64")),
        (errors.SchemaError, "metadata.schema", lambda h: h["__metadata__"].update(schema="0" * 64)),
        (errors.MetadataError, "metadata.base", lambda h: h["__metadata__"].pop("base")),
        (errors.MetadataError, "metadata.base", lambda h: h["__metadata__"].update(base="1")),
        (errors.BaseError, "metadata.base", lambda h: h["__metadata__"].update(base="01234567")),
        (errors.FormatError, "metadata", lambda h: h.pop("__metadata__")),
    ],
)
def test_edited_headers_are_refused(kind: type[WireError], field: str, edit: Callable[..., object]) -> None:
    plan, message, base = small()
    header, data = split(message)
    edit(header)
    bad = join(header, data, reseal="__metadata__" in header and all(type(v) is dict for v in header.values()))
    with pytest.raises(WireError) as caught:
        plan.read(bad, base=base)
    assert (type(caught.value), caught.value.field) == (kind, field)


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "delta"), ("int4", "delta"), ("bfloat16", "sparse")])
def test_another_base_is_refused_by_every_reader(dtype: str, kind: str) -> None:
    plan, message, base = small(dtype, **{kind: True})
    other, into, sum = base.clone(), make_flat(SMALL), torch.zeros(plan.numel, dtype=torch.float64)
    other[-1] += 1
    kept = into.data.clone()
    for use in (
        lambda: plan.read(message, base=other),
        lambda: plan.unpack(message, base=other),
        lambda: plan.load(message, into, base=other),
        lambda: plan.add_(sum, message, 1.0, base=other),
        lambda: aggregate(plan, [message], [1.0], base=other),
    ):
        with pytest.raises(errors.BaseError) as caught:
            use()
        assert caught.value.field == "metadata.base"
    for use in (lambda: plan.read(message), lambda: plan.load(message, into), lambda: aggregate(plan, [message], [1])):
        with pytest.raises(ValueError, match=r"^base: None, wanted float32"):
            use()
    assert torch.equal(into.data, kept)
    assert not sum.any()


def test_plans_of_one_kind_refuse_the_messages_of_another() -> None:
    kinds: list[dict[str, bool]] = [{}, {"delta": True}, {"sparse": True}, {"delta": True, "sparse": True}]
    flat = make_flat(SMALL)
    plans = [WirePlan(flat, (0,), **kind) for kind in kinds]
    base, rows = plans[0].gather(flat), torch.ones(10, dtype=torch.bool)
    assert len({plan.fingerprint for plan in plans}) == len(plans)
    for sender in plans:
        based = {"base": base} if sender.delta or sender.sparse else {}
        message = sender.pack(flat, round=0, num_samples=0, **based, **({"rows": rows} if sender.sparse else {}))
        for reader in plans:
            own = {"base": base} if reader.delta or reader.sparse else {}
            if reader is sender:
                reader.read(message, **own)
                continue
            with pytest.raises(WireError) as caught:
                reader.read(message, **own)
            assert caught.value.field == "metadata.schema"


@pytest.mark.parametrize("kind", [{"delta": True}, {"sparse": True}, {"delta": True, "sparse": True}])
def test_every_cut_and_every_flipped_bit_is_refused(kind: dict[str, bool]) -> None:
    plan, message, base = small("int4", **kind)
    for end in range(len(message)):
        with pytest.raises(WireError):
            plan.read(message[:end], base=base)
    for byte in range(len(message)):
        for bit in range(8):
            message[byte] ^= 1 << bit
            with pytest.raises(WireError):
                plan.read(message, base=base)
            message[byte] ^= 1 << bit
    assert plan.read(message, base=base) == Message(6, 77)


@pytest.mark.parametrize("kind", [{}, {"sparse": True}])
def test_a_message_longer_than_allowed_is_refused_before_it_is_looked_at(kind: dict[str, bool]) -> None:
    flat = make_flat(SMALL)
    plan = WirePlan(flat, (0,), **kind)
    based = {"base": plan.gather(flat)} if kind else {}
    rows = {"rows": torch.ones(10, dtype=torch.bool)} if kind else {}
    message = plan.pack(flat, round=0, num_samples=0, **based, **rows)
    junk = torch.zeros(len(message) + 1, dtype=torch.uint8)
    sum = torch.zeros(plan.numel, dtype=torch.float64)
    for use in (
        lambda m, n: plan.read(m, max_bytes=n, **based),
        lambda m, n: plan.unpack(m, max_bytes=n, **based),
        lambda m, n: plan.load(m, flat, max_bytes=n, **based),
        lambda m, n: plan.add_(sum, m, 1.0, max_bytes=n, **based),
        lambda m, n: aggregate(plan, [m], [1.0], max_bytes=n, **based),
    ):
        use(message, len(message))
        with pytest.raises(errors.LengthError, match=rf"{len(junk)} bytes, wanted at most {len(message)} \(max_bytes"):
            use(junk, len(message))
        with pytest.raises(TypeError, match=r"^max_bytes: 1\.5, wanted an integer"):
            use(message, 1.5)


def test_no_message_that_is_accepted_is_longer_than_max_bytes_of_the_plan() -> None:
    plan, message, base = small("int8", sparse=True, delta=True)
    assert len(message) <= plan.nbytes <= plan.max_bytes
    header, data = split(message)
    raw = edited(message, lambda h: h["__metadata__"].update(note="x" * (plan.max_bytes - 3000))).numpy().tobytes()
    size = int.from_bytes(raw[:8], "little")
    room = plan._frame.header.limit - size
    padded = (size + room // 8 * 8).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * (room // 8 * 8) + data
    assert plan.read(padded, base=base, max_bytes=plan.max_bytes) == Message(6, 77)
    assert plan.max_bytes - len(padded) < plan._frame.header.data_nbytes + 8
    assert header["__metadata__"]["version"] == "1.1"


@pytest.mark.parametrize("kind", [{"delta": True}, {"delta": True, "sparse": True}])
def test_a_sum_of_base_and_difference_beyond_float32_is_refused(kind: dict[str, bool]) -> None:
    plan, _, _ = small("bfloat16", **kind)
    flat, into = make_flat(SMALL), make_flat(SMALL, seed=1)
    flat.data[0] = 3.4025e38
    base = torch.zeros(plan.numel)
    base[0] = 1.65e36  # the difference is rounded up to bfloat16's largest
    rows = {"rows": torch.ones(10, dtype=torch.bool)} if plan.sparse else {}
    message = plan.pack(flat, round=0, num_samples=1, base=base, **rows)
    kept = into.data.clone()
    refused: list[int] = []
    with pytest.raises(errors.CountError, match="all 1 messages were refused"):
        aggregate(plan, [message], base=base, on_refused=lambda index, _: refused.append(index))
    assert refused == [0]
    for use in (lambda: plan.load(message, into, base=base), lambda: aggregate(plan, [message], base=base)):
        with pytest.raises(errors.NotFiniteError, match="the sum of base and difference is beyond float32") as caught:
            use()
        assert caught.value.field == NAME
    assert torch.equal(into.data, kept)
