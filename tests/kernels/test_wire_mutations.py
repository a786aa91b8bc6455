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
from tests.attacks import mutate, writer
from tests.attacks.make import ATTACKS, GOOD, Attack

from .wire_tiny import Receiver, tiny_plan

RECEIVERS = {dtype: Receiver(dtype) for dtype in writer.CODES}


def checked(dtype: str, message: bytes) -> str:
    """The name of the refusal, or "accepted"."""
    refusal = RECEIVERS[dtype].check(message)
    return type(refusal).__name__ if refusal else "accepted"


@settings(max_examples=250)
@given(random=st.randoms(use_true_random=False), dtypes=st.permutations(tuple(writer.CODES)))
def test_a_damaged_message_is_refused_or_means_what_its_bytes_say(random: Random, dtypes: list[str]) -> None:
    dtype, other, *_ = dtypes
    message = mutate.mutated(RECEIVERS[dtype].good, random, RECEIVERS[other].good)
    checked(dtype, message)
    checked(other, message)


@settings(max_examples=250)
@given(raw=st.binary(max_size=600), at=st.integers(0, len(GOOD)))
def test_any_bytes_and_a_good_beginning_with_any_end_are_refused(raw: bytes, at: int) -> None:
    assert RECEIVERS["float32"].check(raw) is not None
    if GOOD[:at] + raw != GOOD:
        assert RECEIVERS["float32"].check(GOOD[:at] + raw) is not None


def test_damage_without_a_checksum_that_fits_never_changes_a_value() -> None:
    for dtype, receiver in RECEIVERS.items():
        _, data = mutate.split(receiver.good)
        for seed in range(300):
            message = Random(seed).choice(mutate.ANY)(receiver.good, Random(seed), GOOD)
            assert checked(dtype, message) != "accepted" or mutate.split(message)[1] == data


def test_what_fuzzing_starts_from_is_refused_or_means_what_its_bytes_say_to_every_plan() -> None:
    seen = Counter(checked(dtype, message[1:]) for message in messages() for dtype in writer.CODES)
    assert seen["accepted"] >= len(writer.CODES)
    assert seen["SchemaError"] > seen["accepted"]


def test_the_damage_gets_to_every_check() -> None:
    """Or the tests above would try the first door only."""
    seen: Counter[str] = Counter()
    for seed in range(3000):
        dtype, other = Random(seed).sample(tuple(writer.CODES), 2)
        seen[checked(dtype, mutate.mutated(RECEIVERS[dtype].good, Random(seed), RECEIVERS[other].good))] += 1
    assert seen.keys() >= {a.error for a in ATTACKS} - {"RoundError"} | {"accepted"}
    assert seen["accepted"] > 100


def allocated(message: bytes, dtype: str) -> tuple[int, int]:
    """What refusing a message allocates, in bytes: Python's peak, and the sum of all that torch asked for."""
    plan, buffer = tiny_plan(dtype), bytearray(message)

    def refused() -> None:
        try:
            plan.read(buffer)
        except WireError:
            return
        raise AssertionError("accepted")

    refused()  # what is made once, and stays
    with profile(profile_memory=True) as profiled:
        refused()
    tracemalloc.start()
    try:
        refused()
        return tracemalloc.get_traced_memory()[1], sum(max(0, e.self_cpu_memory_usage) for e in profiled.events())
    finally:
        tracemalloc.stop()


def test_what_a_header_declares_is_not_allocated() -> None:
    for declared in (2**60, 2**40, 2**31, len(GOOD) + 1):
        python, ours = allocated(struct.pack("<Q", declared) + GOOD[8:], "float32")
        assert (python < 32 << 10, ours < 64) == (True, True), declared  # three numbers say that it is refused


@pytest.mark.parametrize("attack", [a for a in ATTACKS if not a.round], ids=lambda a: a.name)
def test_no_attack_makes_the_reader_allocate_more_than_its_own_size(attack: Attack) -> None:
    python, ours = allocated(attack.message, attack.dtype)
    assert python < (64 << 10) + 64 * len(attack.message)
    assert ours < 4096


def test_the_measure_sees_what_torch_allocates() -> None:
    with profile(profile_memory=True) as profiled:
        torch.empty(1 << 20, dtype=torch.uint8)
    assert sum(max(0, e.self_cpu_memory_usage) for e in profiled.events()) >= 1 << 20
