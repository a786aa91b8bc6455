"""Messages of version 1.0, kept as files: read to the bit and written again, byte for byte, by every later library.

tests/golden/1.0/DTYPE.safetensors is the tiny adapter (tests/attacks/writer.py), all layers, round 6, 77 samples,
written once when 1.0 was new; values.json has what each stands for, {dtype: {name: [float.hex, ...]}}. None of it may
change.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as safetensors_load

from fibecfed_kernels import Message, aggregate
from fibecfed_kernels.wire.errors import VersionError
from tests.attacks import writer

from .wire_tiny import tiny_flat, tiny_plan
from .wire_tools import values_of

FOLDER = Path(__file__).parents[1] / "golden" / "1.0"
LAYERS = (0, 1)
HEXES: dict[str, dict[str, list[str]]] = json.loads((FOLDER / "values.json").read_text())
DTYPES = tuple(HEXES)


def golden(dtype: str) -> bytes:
    return (FOLDER / f"{dtype}.safetensors").read_bytes()


def bits(values: torch.Tensor) -> list[int]:
    """So that −0 is not 0."""
    return values.view(torch.int32).tolist()


def wanted(dtype: str) -> torch.Tensor:
    """The values of all tensors, one after the other, float32."""
    numbers = [float.fromhex(text) for texts in HEXES[dtype].values() for text in texts]
    return torch.frombuffer(bytearray(struct.pack(f"<{len(numbers)}f", *numbers)), dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_messages_are_read_to_the_bit(dtype: str) -> None:
    plan, into, message = tiny_plan(dtype, LAYERS), tiny_flat(), golden(dtype)
    assert list(HEXES[dtype]) == list(plan.names)
    into.data.fill_(torch.nan)
    assert plan.load(message, into, round=6) == Message(6, 77)
    assert bits(into.data) == bits(wanted(dtype))
    assert bits(values_of(plan.unpack(message), plan)) == bits(wanted(dtype))
    assert torch.equal(aggregate(plan, [message], [77]), wanted(dtype))  # a sum from +0 has no −0


@pytest.mark.parametrize("dtype", DTYPES)
def test_golden_messages_are_written_again_byte_for_byte(dtype: str) -> None:
    message = tiny_plan(dtype, LAYERS).pack(tiny_flat(), round=6, num_samples=77)
    assert bytes(message.numpy()) == golden(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_writer_and_safetensors_agree_with_the_golden_messages(dtype: str) -> None:
    assert writer.file(*writer.parts(dtype, LAYERS)) == golden(dtype)
    assert bits(values_of(safetensors_load(golden(dtype)), tiny_plan(dtype, LAYERS))) == bits(wanted(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_later_minor_version_is_read_and_another_major_refused(dtype: str) -> None:
    plan, into = tiny_plan(dtype, LAYERS), tiny_flat()
    into.data.fill_(torch.nan)
    later = writer.file(*writer.parts(dtype, LAYERS, version="1.7"))
    assert later != golden(dtype)
    assert plan.load(later, into, round=6) == Message(6, 77)
    assert bits(into.data) == bits(wanted(dtype))
    with pytest.raises(VersionError, match=r"^metadata\.version: 2\.0, this reader knows 1\.x"):
        plan.read(writer.file(*writer.parts(dtype, LAYERS, version="2.0")))
