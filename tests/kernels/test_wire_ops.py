"""The four ops one by one: bodies equal bit for bit, conversions equal torch's, checksums equal the standard's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fibecfed_kernels.wire.digest as checksums
from fibecfed_kernels import WirePlan, use_backend
from fibecfed_kernels.wire import reference

from .bodies import bodies, needs_cpp
from .wire_tools import DTYPES, make_flat

ops = torch.ops.fibecfed


CPU = torch.device("cpu")


def operands(dtype: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """data, table, and empty values and scales, of a plan over part of a flat buffer."""
    flat = make_flat(spread=0.5)
    plan = WirePlan(flat, (0, 2), dtype)
    payload = torch.zeros(plan._frame.header.data_nbytes, dtype=torch.uint8)
    return flat.data, plan._table("flat to message", CPU), *plan._frame.typed(payload)


def all_float32(count: int) -> Tensor:
    """Bit patterns of every exponent, many of them exact ties of the narrower dtypes; no NaN."""
    bits = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32)
    bits[::3] &= -(2**12)
    bits[1::3] &= -(2**15)
    data = bits.view(torch.float32)
    return torch.cat([data[~data.isnan()], torch.tensor([float("inf"), float("-inf"), 0.0, -0.0, 2.0**-25, 65519.996])])


@bodies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conversions_are_torchs_own(body: str, dtype: torch.dtype) -> None:
    module = ops if body == "cpp" else reference
    data = all_float32(100_000)
    table = torch.tensor([[0, 0, 0, 1, len(data)]])
    values, back = torch.empty(len(data), dtype=dtype), torch.empty(len(data))
    module.wire_pack_(data, table, values, torch.empty(0))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(values.view(bits), data.to(dtype).view(bits))
    module.wire_unpack_(values, torch.empty(0), table, back)
    assert torch.equal(back.view(torch.int32), data.to(dtype).float().view(torch.int32))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_value_decodes_and_encodes_to_itself(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    table = torch.tensor([[0, 0, 0, 1, len(values)]])
    back, again = torch.empty(len(values)), torch.empty_like(values)
    ops.wire_unpack_(values, torch.empty(0), table, back)
    ops.wire_pack_(back, table, again, torch.empty(0))
    assert torch.equal(back.isnan(), values.float().isnan())
    good = ~back.isnan()
    assert torch.equal(back[good].view(torch.int32), values.float()[good].view(torch.int32))
    assert torch.equal(again[good].view(torch.int16), values[good].view(torch.int16))
    assert again.isnan().equal(values.isnan())


@needs_cpp
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bodies_are_equal_bit_for_bit(dtype: str) -> None:
    data, table, values, scales = operands(dtype)
    if dtype == "int8":
        data[40:80] *= 1e-37
        data[130:150] *= 1e25
    wanted, wanted_scales = values.clone(), scales.clone()
    ops.wire_pack_(data, table, values, scales)
    reference.wire_pack_(data, table, wanted, wanted_scales)
    assert torch.equal(values, wanted)
    assert torch.equal(scales, wanted_scales)
    into, wanted_into = torch.zeros_like(data), torch.zeros_like(data)
    ops.wire_unpack_(values, scales, table, into)
    reference.wire_unpack_(values, scales, table, wanted_into)
    assert torch.equal(into, wanted_into)
    sums = torch.rand(2, len(data), dtype=torch.float64)
    sums[1] = sums[0]
    ops.wire_accumulate_(sums[0], [values, values], [scales, scales], table, [1 / 3, -7.0])
    reference.wire_accumulate_(sums[1], [values, values], [scales, scales], table, [1 / 3, -7.0])
    assert torch.equal(sums[0], sums[1])
    means = torch.full((2, len(data)), torch.nan)
    for before in (sums[0], sums[0][:0]):
        arguments = before, [values, values], [scales, scales], table, [1 / 3, 7.0], 1 / 3 + 7.0
        ops.wire_mean_(means[0], *arguments)
        reference.wire_mean_(means[1], *arguments)
        moved = torch.cat([torch.arange(start, start + rows * n) for start, _, _, rows, n in table.tolist()])
        assert torch.equal(means[0][moved], means[1][moved])


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_threads_write_what_one_does(dtype: str) -> None:
    """Large enough that the C++ bodies divide the work."""
    flat = make_flat([(0, (300, 2500)), (0, (40_000, 8))], spread=0.3)
    plan = WirePlan(flat, (0,), dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            message = plan.pack(flat, round=0, num_samples=0)
            total = torch.zeros(plan.numel, dtype=torch.float64)
            plan.add_(total, message, 0.7)
            found.append((message, total))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: str) -> None:
    data, table, values, scales = operands(dtype)
    torch.library.opcheck(ops.wire_pack_.default, (data, table, values.clone(), scales.clone()))
    ops.wire_pack_(data, table, values, scales)
    values, scales = values.clone(), scales.clone()
    torch.library.opcheck(ops.wire_unpack_.default, (values, scales, table, data.clone()))
    total = torch.zeros(len(data), dtype=torch.float64)
    both = [values, values], [scales, scales], table, [2.5, 1.0]
    torch.library.opcheck(ops.wire_accumulate_.default, (total, *both))
    torch.library.opcheck(ops.wire_mean_.default, (torch.zeros(len(data)), total, *both, 3.5))


def test_opcheck_digest() -> None:
    buffer = torch.arange(256).to(torch.uint8)
    torch.library.opcheck(
        ops.wire_digest.default, (buffer, torch.tensor([[0, 256, 0], [4, 64, 1], [2, 8, 2], [8, 8, 3]]))
    )


@bodies
def test_crc32c_of_the_standards_examples(body: str) -> None:
    """RFC 3720, B.4, and the check value of the CRC catalogue."""
    examples = {
        b"": 0,
        b"123456789": 0xE3069283,
        bytes(32): 0x8A9136AA,
        b"\xff" * 32: 0x62A8AB43,
        bytes(range(32)): 0x46DD794E,
        bytes(range(31, -1, -1)): 0x113FDB5C,
    }
    with use_backend(body):
        assert {data: checksums.crc32c(data) for data in examples} == examples


@needs_cpp
def test_digest_bodies_agree_at_every_length_and_place() -> None:
    buffer = torch.randint(0, 256, (20_000,), dtype=torch.uint8)
    buffer.view(torch.float32)[torch.randint(0, 5000, (50,))] = float("inf")
    edges = [0, 1, 2, 3, 4, 7, 8, 9, 767, 768, 769, 1535, 6143, 6144, 6145, 6152, 12_288, 12_289, 20_000]
    ranges = [[start, stop, 0] for start in (0, 1, 5) for stop in edges if stop >= start]
    ranges += [
        [start, stop, kind]
        for kind, size in ((1, 4), (2, 2), (3, 2), (4, 4))
        for start in (0, 4)
        for stop in range(start, 100, size)
    ]
    ranges += [[8, 20_000, kind] for kind in (1, 2, 3, 4)]
    assert torch.equal(
        ops.wire_digest(buffer, torch.tensor(ranges)), reference.wire_digest(buffer, torch.tensor(ranges))
    )


@bodies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_one_value_that_is_not_finite_is_found_anywhere(body: str, dtype: torch.dtype, value: float) -> None:
    kind = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}[dtype]
    count = 4000 if body == "cpp" else 400  # beyond the chunks that the C++ body works in
    values = torch.full((count,), torch.finfo(dtype).max, dtype=dtype)
    raw = values.view(torch.uint8)
    ranges = torch.tensor([[0, len(raw), kind]])
    with use_backend(body):
        assert checksums.digest(raw, ranges)[1] == [False]
        for at in (0, 1, 63, count // 2, *(at for at in (1535, 1536, 3071, 3072) if at < count), count - 1):
            kept, values[at] = values[at].clone(), value
            assert checksums.digest(raw, ranges)[1] == [True]
            values[at] = kept


@needs_cpp
@pytest.mark.parametrize(
    "line",
    [
        [-1, 0, 0, 1, 4],
        [0, -1, 0, 1, 4],
        [0, 0, 0, -1, -4],
        [6, 0, 0, 1, 4],
        [0, 6, 0, 1, 4],
        [0, 0, 0, 2**40, 2**40],
        [0, 0, 3, 2, 2],
    ],
)
def test_a_table_that_reaches_outside_is_refused(line: list[int]) -> None:
    data, table = torch.zeros(8), torch.tensor([line])
    values, scales = torch.zeros(8, dtype=torch.int8), torch.zeros(4)
    for call in (
        lambda: ops.wire_pack_(data, table, values, scales),
        lambda: ops.wire_unpack_(values, scales, table, data),
    ):
        with pytest.raises(RuntimeError, match="line 0 reaches outside"):
            call()
    for start, stop, kind in ((0, 9, 0), (-1, 4, 0), (4, 3, 0), (0, 8, 5), (1, 5, 1), (0, 3, 2), (0, 2, 4)):
        with pytest.raises(RuntimeError, match="ranges: line 0"):
            ops.wire_digest(values.view(torch.uint8), torch.tensor([[start, stop, kind]]))


@needs_cpp
def test_messages_that_are_added_together_are_of_one_kind() -> None:
    table, sum = torch.tensor([[0, 0, 0, 1, 4]]), torch.zeros(8, dtype=torch.float64)
    values, scales = torch.ones(8, dtype=torch.int8), torch.ones(1)
    ops.wire_accumulate_(sum, [values, values], [scales, scales], table, [1.0, 2.0])
    assert sum.tolist() == [3.0] * 4 + [0.0] * 4
    for arguments in (
        ([values, values], [scales], [1.0, 1.0]),
        ([values, values], [scales, scales], [1.0]),
        ([values, values.view(torch.uint8)], [scales, scales], [1.0, 1.0]),
        ([values, values.float()], [scales, scales], [1.0, 1.0]),
    ):
        with pytest.raises(RuntimeError, match=r"wanted one (a message|dtype)"):
            ops.wire_accumulate_(sum, *arguments[:2], table, arguments[2])
        with pytest.raises(RuntimeError, match=r"wanted one (a message|dtype)"):
            ops.wire_mean_(sum.float(), sum, *arguments[:2], table, arguments[2], 1.0)
    none = sum[:0]
    for mean, start in ((torch.zeros(8), sum[:4]), (torch.zeros(3), none), (sum, none), (torch.zeros(8), none.float())):
        with pytest.raises(RuntimeError, match=r"sum: wanted none|reaches outside|mean: wrong dtype|sum: wrong dtype"):
            ops.wire_mean_(mean, start, [values], [scales], table, [1.0], 1.0)
