"""Decoding trusts nothing: each refusal by a crafted message, and every cut and every flipped bit of a small one."""

from __future__ import annotations

import json
import re
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fibecfed_kernels import Message, WireError, WirePlan
from fibecfed_kernels.wire import errors
from fibecfed_kernels.wire.format import LEVELS

from .wire_tools import DTYPES, edited, join, make_flat, split

SMALL = ((0, (2, 3)), (1, (4, 2)), (None, (2,)))
NAME = "block.0.0.weight"


def small(dtype: str = "float32") -> tuple[WirePlan, torch.Tensor]:
    flat = make_flat(SMALL, spread=0.2)
    plan = WirePlan(flat, (0,), dtype)
    return plan, plan.pack(flat, round=6, num_samples=77)


def metadata(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update(fields)


def tensor(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[NAME].update(fields)


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        for key in path[:-1]:
            header = header[key]
        del header[path[-1]]

    return edit


def renamed(header: dict[str, Any]) -> None:
    header["other"] = header.pop(NAME)


def extra(header: dict[str, Any]) -> None:
    header["other"] = {"dtype": "F32", "shape": [0], "data_offsets": [32, 32]}


# (what the error is, its field, the edit, whether the attacker makes the checksums right)
EDITS: dict[str, tuple[type[WireError], str, Callable[[dict[str, Any]], None], bool]] = {
    "plain safetensors": (errors.FormatError, "metadata", without("__metadata__"), False),
    "metadata a list": (errors.FormatError, "metadata", lambda h: h.update(__metadata__=[]), False),
    "another format": (errors.FormatError, "metadata.format", metadata(format="pt"), False),
    "no format": (errors.FormatError, "metadata.format", without("__metadata__", "format"), False),
    "major version": (errors.VersionError, "metadata.version", metadata(version="2.0"), True),
    "version 10": (errors.VersionError, "metadata.version", metadata(version="10.0"), True),
    "no version": (errors.MetadataError, "metadata.version", without("__metadata__", "version"), False),
    "version a number": (errors.MetadataError, "metadata.version", metadata(version=1), False),
    "odd version": (errors.MetadataError, "metadata.version", metadata(version="1.0\n"), False),
    "wire dtype": (errors.SchemaError, "metadata.dtype", metadata(dtype="int8"), True),
    "layers": (errors.SchemaError, "metadata.layers", metadata(layers="[1]"), True),
    "fingerprint": (errors.SchemaError, "metadata.schema", metadata(schema="0" * 64), True),
    "no fingerprint": (errors.SchemaError, "metadata.schema", without("__metadata__", "schema"), False),
    "fingerprint nested": (errors.MetadataError, "metadata.schema", metadata(schema=[["x"] * 99]), False),
    "round short": (errors.MetadataError, "metadata.round", metadata(round="6"), True),
    "round negative": (errors.MetadataError, "metadata.round", metadata(round="-000000000000006"), True),
    "round not ASCII": (errors.MetadataError, "metadata.round", metadata(round="٠٠٠٠٠٠٠٠٠٠٠٠٠٠٠٦"), True),
    "round a number": (errors.MetadataError, "metadata.round", metadata(round=6), False),
    "no samples": (errors.MetadataError, "metadata.num_samples", without("__metadata__", "num_samples"), False),
    "checksums short": (errors.MetadataError, "metadata.crc32c", metadata(crc32c="00000000"), False),
    "checksums upper": (errors.MetadataError, "metadata.crc32c", metadata(crc32c="ABCDEF01" * 2), False),
    "no seal": (errors.MetadataError, "metadata.seal", without("__metadata__", "seal"), False),
    "round changed": (errors.ChecksumError, "metadata.seal", metadata(round=f"{7:016d}"), False),
    "samples changed": (errors.ChecksumError, "metadata.seal", metadata(num_samples=f"{10**15:016d}"), False),
    "missing tensor": (errors.NamesError, NAME, without(NAME), True),
    "renamed tensor": (errors.NamesError, NAME, renamed, True),
    "extra tensor": (errors.NamesError, "'other'", extra, False),
    "dtype F64": (errors.DtypeError, f"{NAME}.dtype", tensor(dtype="F64"), True),
    "dtype BF16": (errors.DtypeError, f"{NAME}.dtype", tensor(dtype="BF16"), True),
    "dtype a list": (errors.DtypeError, f"{NAME}.dtype", tensor(dtype=["F32"]), True),
    "shape turned": (errors.ShapeError, f"{NAME}.shape", tensor(shape=[3, 2]), True),
    "shape flat": (errors.ShapeError, f"{NAME}.shape", tensor(shape=[6]), True),
    "shape huge": (errors.ShapeError, f"{NAME}.shape", tensor(shape=[2**60, 2**60]), True),
    "shape nested": (errors.ShapeError, f"{NAME}.shape", tensor(shape=[[2, 3]]), True),
    "shape null": (errors.ShapeError, f"{NAME}.shape", tensor(shape=None), True),
    "offsets swapped": (errors.OffsetsError, f"{NAME}.data_offsets", tensor(data_offsets=[24, 0]), False),
    "offsets overlap": (errors.OffsetsError, f"{NAME}.data_offsets", tensor(data_offsets=[0, 28]), False),
    "offsets hole": (errors.OffsetsError, f"{NAME}.data_offsets", tensor(data_offsets=[0, 20]), False),
    "offsets far": (errors.OffsetsError, f"{NAME}.data_offsets", tensor(data_offsets=[2**60, 2**60 + 24]), False),
    "offsets negative": (errors.OffsetsError, f"{NAME}.data_offsets", tensor(data_offsets=[-24, 0]), False),
    "offsets true": (errors.OffsetsError, f"{NAME}.data_offsets", tensor(data_offsets=[False, 24]), False),
    "tensor a list": (errors.HeaderError, NAME, lambda h: h.update({NAME: [1]}), False),
    "tensor with more": (errors.HeaderError, NAME, tensor(stride=[3, 1]), True),
    "a float": (errors.HeaderError, "header", tensor(shape=[2.0, 3]), True),
    "not a number": (errors.HeaderError, "header", tensor(shape=[float("nan")]), True),
    "a huge integer": (errors.HeaderError, "header", tensor(shape=[10**40]), True),
}


@pytest.mark.parametrize("case", EDITS)
def test_edited_headers_are_refused(case: str) -> None:
    plan, message = small()
    kind, field, edit, reseal = EDITS[case]
    bad = edited(message, edit, reseal)
    for read in (plan.read, plan.unpack, lambda m: plan.load(m, make_flat(SMALL))):
        with pytest.raises(WireError) as caught:
            read(bad)
        assert (type(caught.value), caught.value.field) == (kind, field)
        assert str(caught.value).startswith(f"{field}: ")
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("kind", "header", "declared"),
    [
        (errors.LengthError, b"", 8),
        (errors.HeaderError, b"", 0),
        (errors.HeaderError, b"", 2**60),
        (errors.HeaderError, b"", 2**64 - 1),
        (errors.HeaderError, b"{}" + b" " * 7, None),
        (errors.HeaderError, b"[]" + b" " * 6, None),
        (errors.HeaderError, b"null    ", None),
        (errors.HeaderError, b"\xff" * 8, None),
        (errors.HeaderError, b"[" * 60000, None),
        (errors.HeaderError, b'{"a":' * 12000, None),
        (errors.HeaderError, b"9" * 60000, None),
        (errors.HeaderError, b" " * (1 << 17), None),
        (errors.DuplicateKeyError, b'{"a":1,"a":1}   ', None),
    ],
)
def test_broken_headers_are_refused(kind: type[WireError], header: bytes, declared: int | None) -> None:
    plan, _ = small()
    with pytest.raises(WireError) as caught:
        plan.read(join(header, b"", declared=declared))
    assert type(caught.value) is kind


def test_duplicate_keys_at_any_depth_are_refused() -> None:
    plan, message = small()
    header, data = split(message)
    text = json.dumps(header).encode()
    for once, twice in (
        (b'"round"', b'"round": "", "round"'),
        (b'"shape"', b'"shape": [], "shape"'),
        (b'{"__', b'{"__metadata__":{},"__'),
    ):
        doubled = text.replace(once, twice, 1)
        with pytest.raises(errors.DuplicateKeyError, match="stands twice"):
            plan.read(join(doubled + b" " * (-len(doubled) % 8), data))


def test_a_header_that_declares_an_exabyte_allocates_nothing() -> None:
    plan, message = small()
    raw = message.clone()
    raw[:8] = torch.tensor(list(struct.pack("<Q", 2**60)), dtype=torch.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(errors.HeaderError, match=f"{2**60} bytes declared"):
            plan.read(raw)
        assert tracemalloc.get_traced_memory()[1] < 64 << 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_after_the_end_and_other_rounds_are_refused(dtype: str) -> None:
    plan, message = small(dtype)
    for more in (1, 8, 4096):
        with pytest.raises(errors.LengthError) as caught:
            plan.read(torch.cat([message, torch.zeros(more, dtype=torch.uint8)]))
        assert caught.value.field == "length"
    with pytest.raises(errors.RoundError, match="6, wanted 7"):
        plan.read(message, round=7)
    assert plan.read(message, round=6) == Message(6, 77)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_messages_that_are_not_finite_are_refused_even_with_right_checksums(dtype: str, value: float) -> None:
    plan, message = small(dtype)
    header, data = split(message)
    bits = torch.tensor([value]).to(torch.float32 if dtype in LEVELS else getattr(torch, dtype)).view(torch.uint8)
    raw = bytearray(data)
    start = 0 if dtype == "int4" else len(bits)  # the first parameter has one block of int4
    raw[start : start + len(bits)] = bytes(bits.tolist())
    into = make_flat(SMALL, seed=3)
    before = into.data.clone()
    with pytest.raises(errors.NotFiniteError) as caught:
        plan.load(join(header, bytes(raw)), into)
    assert caught.value.field == (f"{NAME}.scale" if dtype in LEVELS else NAME)
    assert torch.equal(into.data, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite_are_not_sent(dtype: str, value: float) -> None:
    flat = make_flat(SMALL)
    plan = WirePlan(flat, (0,), dtype)
    flat.data[-1] = value
    with pytest.raises(errors.NotFiniteError, match=r"^head\.2: holds an infinite value or NaN"):
        plan.pack(flat, round=0, num_samples=0)


@pytest.mark.parametrize(
    ("dtype", "largest", "beyond"), [("float16", 65519.9, 65520.0), ("bfloat16", 3.3895e38, 3.4e38)]
)
def test_values_beyond_the_wire_dtype_are_not_sent(dtype: str, largest: float, beyond: float) -> None:
    flat = make_flat(SMALL)
    plan = WirePlan(flat, (0,), dtype)
    flat.data[0] = -largest
    plan.pack(flat, round=0, num_samples=0)
    flat.data[0] = -beyond
    with pytest.raises(errors.RangeError, match=re.escape(f"{NAME}: magnitude {beyond:g} does not fit {dtype}")):
        plan.pack(flat, round=0, num_samples=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_message_cut_at_any_byte_is_refused(dtype: str) -> None:
    plan, message = small(dtype)
    for end in range(len(message)):
        with pytest.raises(WireError):
            plan.read(message[:end])


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_a_flip_of_any_bit_is_refused(dtype: str) -> None:
    """Refused, though decoding to the same tensors would do: the seal covers what the payloads' checksums do not.

    The one exception is the minor version, which a reader of 1.0 must accept; the seal refuses that too.
    """
    plan, message = small(dtype)
    for byte in range(len(message)):
        for bit in range(8):
            message[byte] ^= 1 << bit
            with pytest.raises(WireError):
                plan.read(message)
            message[byte] ^= 1 << bit
    assert plan.read(message) == Message(6, 77)


def test_a_header_longer_than_any_writers_is_refused_unread() -> None:
    plan, _ = small()
    limit = plan.max_bytes - 8 - sum(4 * n for n in (6, 2))  # of the header alone: two payloads travel beside it
    for declared, words in ((limit + 1, "wanted at most"), (limit, "JSON")):
        message = torch.zeros(declared + 16, dtype=torch.uint8)
        message[:8] = torch.frombuffer(bytearray(struct.pack("<Q", declared)), dtype=torch.uint8)
        with pytest.raises(WireError, match=words):
            plan.read(message)
