"""Messages of released versions, kept as files: read to the bit and written again by every later library.

tests/golden/VERSION/KIND.safetensors is the tiny adapter (tests/attacks/writer.py), all layers, round 6, 77 samples,
written once when the version was new; values.json has what each stands for, {kind: {name: [float.hex, ...]}}, and in
1.1 also "base". None of it may change.
"""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load as safetensors_load

from fibecfed_kernels import Message, aggregate
from fibecfed_kernels.wire.errors import VersionError
from tests.attacks import writer
from tests.attacks.writer import INT4_DELTA_SPARSE, KINDS, OF_1_1, Kind
from tests.golden import FOLDER, golden

from .wire_tiny import meant, packed, tiny_base, tiny_flat, tiny_plan

LAYERS = (0, 1)
Hexes = dict[str, list[str]]
HEXES: dict[str, dict[str, Hexes]] = {
    version: json.loads((FOLDER / version / "values.json").read_text()) for version in ("1.0", "1.1")
}
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def bits(values: torch.Tensor) -> list[int]:
    """So that −0 is not 0."""
    return values.view(torch.int32).tolist()


def floats(hexes: Hexes) -> torch.Tensor:
    """The values of all tensors, one after the other, float32."""
    numbers = [float.fromhex(text) for texts in hexes.values() for text in texts]
    return torch.frombuffer(bytearray(struct.pack(f"<{len(numbers)}f", *numbers)), dtype=torch.float32)


def wanted(kind: Kind) -> torch.Tensor:
    return floats(HEXES[kind.version][kind.name])


def test_each_file_is_of_a_kind_and_each_kind_has_its_values() -> None:
    for version, kept in HEXES.items():
        names = {kind.name for kind in KINDS if kind.version == version}
        assert {path.stem for path in (FOLDER / version).glob("*.safetensors")} == names == kept.keys() - {"base"}


def test_the_base_is_the_one_that_is_kept() -> None:
    for kind in OF_1_1:
        base = tiny_base(kind, LAYERS)
        assert base is None or bits(base) == bits(floats(HEXES["1.1"]["base"]))
    sent = HEXES["1.1"][INT4_DELTA_SPARSE.name]
    assert sent["head.bias"] == HEXES["1.1"]["base"]["head.bias"]  # none of its rows was sent


@every_kind
def test_golden_messages_are_read_to_the_bit(kind: Kind) -> None:
    plan, into, message, base = tiny_plan(kind, LAYERS), tiny_flat(kind.entries), golden(kind), tiny_base(kind, LAYERS)
    assert list(HEXES[kind.version][kind.name]) == list(plan.names)
    into.data.fill_(torch.nan)
    assert plan.load(message, into, round=6, base=base) == Message(6, 77)
    assert bits(into.data) == bits(wanted(kind))
    values = meant(plan.unpack(message, base=base), kind, LAYERS)
    assert bits(values) == bits(wanted(kind))
    assert torch.equal(aggregate(plan, [message], [77], base=base), wanted(kind))  # a sum from +0 has no −0


@every_kind
def test_golden_messages_are_written_again_byte_for_byte(kind: Kind) -> None:
    assert packed(kind, LAYERS) == golden(kind)


@every_kind
def test_a_second_writer_and_safetensors_agree_with_the_golden_messages(kind: Kind) -> None:
    assert writer.file(*writer.parts(kind, LAYERS)) == golden(kind)
    values = meant(safetensors_load(golden(kind)), kind, LAYERS)
    assert bits(values) == bits(wanted(kind))


@every_kind
def test_a_later_minor_version_is_read_and_another_major_refused(kind: Kind) -> None:
    plan, into, base = tiny_plan(kind, LAYERS), tiny_flat(kind.entries), tiny_base(kind, LAYERS)
    into.data.fill_(torch.nan)
    later = writer.file(*writer.parts(kind, LAYERS, version="1.9"))
    assert later != golden(kind)
    assert plan.load(later, into, round=6, base=base) == Message(6, 77)
    assert bits(into.data) == bits(wanted(kind))
    with pytest.raises(VersionError, match=r"^metadata\.version: 2\.0, this reader knows 1\.x"):
        plan.read(writer.file(*writer.parts(kind, LAYERS, version="2.0")), base=base)
