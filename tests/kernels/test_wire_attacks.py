"""The crafted messages of tests/attacks: each is refused wherever messages come in, for the reason it was made for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch

from fibecfed_kernels import Message, WireError, aggregate, use_backend
from fibecfed_kernels.wire import errors
from tests.attacks import writer
from tests.attacks.edits import Attack
from tests.attacks.make import ATTACKS, FOLDER
from tests.attacks.writer import FLOAT32, INT4, INT8, Kind

from .bodies import PARAMS
from .wire_tiny import packed, tiny_base, tiny_flat, tiny_plan

# raised for what a caller gives: no message causes them
NO_MESSAGE = {errors.RangeError, errors.WeightError, errors.CountError}
CASES = [pytest.param(attack, id=attack.name) for attack in ATTACKS]


@pytest.fixture(params=PARAMS)
def body(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


def refusal(use: Callable[[], object]) -> tuple[str, str, int | None]:
    with pytest.raises(WireError) as caught:
        use()
    return type(caught.value).__name__, caught.value.field, caught.value.index


def test_the_files_are_those_that_the_script_writes() -> None:
    assert {path.stem for path in FOLDER.glob("*.safetensors")} == {a.name for a in ATTACKS}
    for attack in ATTACKS:
        assert (FOLDER / f"{attack.name}.safetensors").read_bytes() == attack.message, attack.name
    assert len({a.message for a in ATTACKS}) == len({a.name for a in ATTACKS}) == len(ATTACKS)


@pytest.mark.parametrize("kind", writer.KINDS, ids=lambda kind: kind.name)
def test_the_message_that_the_attacks_change_is_the_librarys_own(kind: Kind) -> None:
    """Or an attack could be refused for another reason than the one it was made for."""
    message = writer.file(*writer.parts(kind))
    assert message == packed(kind)
    assert tiny_plan(kind).read(message, round=6, base=tiny_base(kind)) == Message(6, 77)


def test_every_attack_is_on_one_of_these_messages() -> None:
    assert {attack.kind for attack in ATTACKS} == set(writer.KINDS)


@pytest.mark.usefixtures("body")
@pytest.mark.parametrize("attack", CASES)
def test_an_attack_is_refused_at_every_door_and_nothing_is_written(attack: Attack) -> None:
    message = (FOLDER / f"{attack.name}.safetensors").read_bytes()
    plan, into, base = tiny_plan(attack.kind), tiny_flat(attack.kind.entries), tiny_base(attack.kind)
    into.data.fill_(0.5)
    sum = torch.full((plan.numel,), 0.25, dtype=torch.float64)
    doors: list[Callable[[], object]] = [
        lambda: plan.read(message, round=attack.round, base=base),
        lambda: plan.unpack(message, round=attack.round, base=base),
        lambda: plan.load(message, into, round=attack.round, base=base),
        lambda: plan.add_(sum, message, 1.0, round=attack.round, base=base),
    ]
    wanted = (attack.error, attack.field)
    assert [refusal(door) for door in doors] == [(*wanted, None)] * len(doors)
    assert into.data.eq(0.5).all()
    assert sum.eq(0.25).all()


@pytest.mark.usefixtures("body")
@pytest.mark.parametrize("attack", CASES)
def test_an_attack_among_messages_is_named_by_its_index_and_can_be_left_out(attack: Attack) -> None:
    bad = (FOLDER / f"{attack.name}.safetensors").read_bytes()
    plan, good = tiny_plan(attack.kind), writer.file(*writer.parts(attack.kind))
    base = tiny_base(attack.kind)

    def mean(**options: Callable[[int, WireError], None]) -> torch.Tensor:
        return aggregate(plan, [good, bad, good], [1.0, 5.0, 2.0], round=attack.round, base=base, **options)

    assert refusal(mean) == (attack.error, attack.field, 1)
    seen: list[tuple[int, str]] = []
    left = mean(on_refused=lambda index, error: seen.append((index, type(error).__name__)))
    assert seen == [(1, attack.error)]
    assert torch.equal(left, aggregate(plan, [good], [1.0], round=attack.round, base=base))


def kinds(base: type[WireError]) -> set[type[WireError]]:
    return {base}.union(*map(kinds, base.__subclasses__()))


def test_every_refusal_that_a_message_can_cause_has_a_file() -> None:
    can = kinds(WireError) - NO_MESSAGE - {WireError}
    assert {attack.error for attack in ATTACKS} == {kind.__name__ for kind in can}


@pytest.mark.usefixtures("body")
@pytest.mark.parametrize(("kind", "largest"), [(FLOAT32, 2.0**128), (INT8, 127 * 2.0**121), (INT4, 7 * 2.0**121)])
def test_what_is_sent_is_finite_when_it_is_read(kind: Kind, largest: float) -> None:
    flat, into, plan = tiny_flat(kind.entries), tiny_flat(kind.entries), tiny_plan(kind)
    flat.data[12] = largest * (1 - 2.0**-23)
    plan.load(plan.pack(flat, round=0, num_samples=0), into)
    assert into.data.isfinite().all()
    assert into.data[12] > 0.99 * flat.data[12]
    if kind != FLOAT32:
        flat.data[12] = largest
        with pytest.raises(
            errors.RangeError, match=re.escape(f"does not fit {kind.dtype}, whose largest is {largest:g}")
        ):
            plan.pack(flat, round=0, num_samples=0)
