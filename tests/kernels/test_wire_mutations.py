"""Random damage: a damaged message is refused with a WireError, or gives exactly what its bytes say."""

from __future__ import annotations

import struct
import tracemalloc
from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import profile

from fibecfed_kernels import WireError
from fuzz.seeds import messages
from tests.attacks import mutate
from tests.attacks.edits import GOOD, Attack
from tests.attacks.make import ATTACKS
from tests.attacks.writer import FLOAT32, KINDS, Kind

from .wire_tiny import Receiver, tiny_base, tiny_plan

RECEIVERS = {kind: Receiver(kind) for kind in KINDS}


def checked(kind: Kind, message: bytes) -> str:
    """The name of the refusal, or "accepted"."""
    refusal = RECEIVERS[kind].check(message)
    return type(refusal).__name__ if refusal else "accepted"


@settings(max_examples=250)
@given(random=st.randoms(use_true_random=False), kinds=st.permutations(KINDS))
def test_a_damaged_message_is_refused_or_means_what_its_bytes_say(random: Random, kinds: list[Kind]) -> None:
    kind, other, *_ = kinds
    message = mutate.mutated(RECEIVERS[kind].good, random, RECEIVERS[other].good)
    checked(kind, message)
    checked(other, message)


@settings(max_examples=250)
@given(raw=st.binary(max_size=600), at=st.integers(0, len(GOOD)))
def test_any_bytes_and_a_good_beginning_with_any_end_are_refused(raw: bytes, at: int) -> None:
    assert RECEIVERS[FLOAT32].check(raw) is not None
    if GOOD[:at] + raw != GOOD:
        assert RECEIVERS[FLOAT32].check(GOOD[:at] + raw) is not None


def test_damage_without_a_checksum_that_fits_never_changes_a_value() -> None:
    for kind, receiver in RECEIVERS.items():
        _, data = mutate.split(receiver.good)
        for seed in range(300):
            message = Random(seed).choice(mutate.ANY)(receiver.good, Random(seed), GOOD)
            assert checked(kind, message) != "accepted" or mutate.split(message)[1] == data


def test_what_fuzzing_starts_from_is_refused_or_means_what_its_bytes_say_to_every_plan() -> None:
    seen = Counter(checked(kind, message[1:]) for message in messages() for kind in KINDS)
    assert seen["accepted"] >= len(KINDS)
    assert seen["SchemaError"] > seen["accepted"]


def test_the_damage_gets_to_every_check() -> None:
    """Or the tests above would try the first door only."""
    seen: Counter[str] = Counter()
    for seed in range(3000):
        kind, other = Random(seed).sample(KINDS, 2)
        seen[checked(kind, mutate.mutated(RECEIVERS[kind].good, Random(seed), RECEIVERS[other].good))] += 1
    assert seen.keys() >= {a.error for a in ATTACKS} - {"RoundError"} | {"accepted"}
    assert seen["accepted"] > 100


def allocated(message: bytes, kind: Kind) -> tuple[int, int]:
    """What refusing a message allocates, in bytes: Python's peak, and the sum of all that torch asked for."""
    plan, base, buffer = tiny_plan(kind), tiny_base(kind), bytearray(message)

    def refused() -> None:
        try:
            plan.read(buffer, base=base)
        except WireError:
            return
        raise AssertionError("accepted")

    refused()  # what is made once, and stays
    with profile(profile_memory=True) as profiled:
        refused()
    ours = sum(max(0, e.self_cpu_memory_usage) for e in profiled.events())
    tracemalloc.start()
    try:
        refused()
        return tracemalloc.get_traced_memory()[1], ours
    finally:
        tracemalloc.stop()


def test_what_a_header_declares_is_not_allocated() -> None:
    for declared in (2**60, 2**40, 2**31, len(GOOD) + 1):
        python, ours = allocated(struct.pack("<Q", declared) + GOOD[8:], FLOAT32)
        assert (python < 32 << 10, ours < 64) == (True, True), declared  # three numbers say that it is refused


@pytest.mark.parametrize("attack", [a for a in ATTACKS if not a.round], ids=lambda a: a.name)
def test_no_attack_makes_the_reader_allocate_more_than_its_own_size(attack: Attack) -> None:
    python, ours = allocated(attack.message, attack.kind)
    assert python < (64 << 10) + 64 * len(attack.message)
    assert ours < 4096


def test_the_measure_sees_what_torch_allocates() -> None:
    with profile(profile_memory=True) as profiled:
        torch.empty(1 << 20, dtype=torch.uint8)
    assert sum(max(0, e.self_cpu_memory_usage) for e in profiled.events()) >= 1 << 20
