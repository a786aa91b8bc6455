"""What fuzzing starts from: ``python -m fuzz.seeds FOLDER`` writes FOLDER/unpack and FOLDER/decoder."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.attacks import writer
from tests.attacks.make import ATTACKS
from tests.attacks.writer import KINDS
from tests.golden import golden

LAYERS = ((1,), (0, 1), ())  # of the receivers in unpack.py: one for each of these and each kind
DECODER_CHECKS = 7  # of decoder.cpp, chosen by an input's first byte
EDGES = (  # where rounding, the range or the rule for a row changes
    *(sign * x for sign in (1.0, -1.0) for x in (0.0, 1.0, 1.5, 2.5, 127.0, 2.0**-149, 2.0**-126, 2.0**-133, 2.0**-14)),
    *(float.fromhex(x) for x in ("0x1.fcp-120", "0x1.fbfffep-120", "0x1.fc0002p-120")),  # 127 · 2^-126, and beside it
    *(float.fromhex(x) for x in ("0x1.cp-124", "0x1.bffffep-124", "0x1.c00002p-124")),  # 7 · 2^-126, and beside it
    *(65504.0, 65519.0, 65520.0, 2.0**-24, 2.0**-25, float.fromhex("0x1.8p-25"), float.fromhex("0x1.000002p-25")),
    *(float.fromhex(x) for x in ("0x1.fep127", "0x1.fefffep127", "0x1.ffp127", "0x1.fffffep127")),
    *(float("inf"), float("-inf"), float("nan")),
)


def messages() -> Iterator[bytes]:
    """Of unpack.py: a byte for the plan, and a message: the golden ones, good ones to every plan (sparse ones also of
    no row and of all), and the attacks."""
    for index, kind in enumerate(KINDS):
        yield bytes([len(KINDS) + index]) + golden(kind)
        for place, layers in enumerate(LAYERS):
            yield bytes([place * len(KINDS) + index]) + writer.file(*writer.parts(kind, layers))
        if kind.sparse:
            yield from (bytes([index]) + writer.file(*writer.parts(kind, rows=rows)) for rows in ((), range(100)))
        yield from (bytes([index]) + attack.message for attack in ATTACKS if attack.kind == kind)


def blocks(random: Random) -> Iterator[bytes]:
    """Two blocks of 64 values, and two values more, none beyond the first one, which is an edge."""
    for most in EDGES:
        if math.isfinite(most):
            yield struct.pack("<130f", most, *(most * random.randint(-(2**24), 2**24) / 2**24 for _ in range(129)))


def numbers() -> Iterator[bytes]:
    """Of decoder.cpp: a byte for the check, one for its parameter, and golden data, edges or noise, up to 8 KiB."""
    random = Random(0)
    edges = struct.pack(f"<{len(EDGES)}f", *EDGES)
    for check in range(DECODER_CHECKS):
        for kind in KINDS:
            yield bytes([check, 8]) + golden(kind)
        yield from (bytes([check, length]) + edges for length in range(40))
        yield from (bytes([check, 63]) + data for data in blocks(random))
        yield from (bytes([check, place]) + b"\xff" * 1534 for place in range(0, 256, 5))  # NaN, also in what is left
        yield from (bytes([check, size % 40]) + random.randbytes(size) for size in (0, 1, 7, 8, 769, 3001, 6145, 8191))


def main() -> None:
    for name, inputs in (("unpack", messages()), ("decoder", numbers())):
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        for index, data in enumerate(inputs):
            (folder / f"{index:04d}").write_bytes(data)


if __name__ == "__main__":
    main()
