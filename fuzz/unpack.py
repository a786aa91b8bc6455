"""Messages made by libFuzzer against the reader: each is refused with a WireError, or gives what its bytes say.

    make fuzz SECONDS=60    or    python -m fuzz.unpack [libFuzzer's arguments] CORPUS…

The first byte of an input chooses the receiver's plan, the rest is the message. Most mutations are those of
tests/attacks/mutate.py, which make length, checksums and seal right again; the others are libFuzzer's own. What it
finds becomes an attack in tests/attacks/make.py.
"""

from __future__ import annotations

import sys
from random import Random

import atheris
import torch

with atheris.instrument_imports(include=["fibecfed_kernels.wire"]):
    import fibecfed_kernels  # noqa: F401

from fuzz.seeds import LAYERS
from tests.attacks import mutate
from tests.attacks.writer import KINDS
from tests.kernels.wire_tiny import Receiver

RECEIVERS = [Receiver(kind, layers) for layers in LAYERS for kind in KINDS]


def receiver_of(data: bytes) -> Receiver:
    return RECEIVERS[data[0] % len(RECEIVERS)]


def one_input(data: bytes) -> None:
    if data:
        receiver_of(data).check(data[1:])


def mutated(data: bytes, most: int, seed: int) -> bytes:
    """A mutation of ``data``, or as often of a good message to the same plan, of at most ``most`` bytes."""
    random = Random(seed)
    if random.randrange(8) == 0:
        return atheris.Mutate(data, most)
    if not data or random.randrange(50) == 0:  # the same message to another plan
        data = bytes([random.randrange(len(RECEIVERS))]) + data[1:]
    message = random.choice((data[1:], receiver_of(data).good))
    return (data[:1] + mutate.mutated(message, random, random.choice(RECEIVERS).good))[:most]


def main() -> None:
    torch.set_num_threads(1)
    atheris.Setup(sys.argv, one_input, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
