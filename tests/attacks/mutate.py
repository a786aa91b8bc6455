"""Random damage to messages, most of it with length, checksums and seal made right again, so that it gets deep."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from random import Random

from .writer import file, sealed

NUMBERS = (
    "0",
    "-0",
    "1",
    "7",
    "-1",
    "24",
    "2.0",
    "1e3",
    "true",
    "null",
    "255",
    str(2**31),
    str(2**60),
    str(2**64),
    "9" * 40,
)
TEXTS = (
    *('""', '"1.7"', '"2.0"', '"I8"', '"U8"', '"I32"', '"F32"', '"[0]"', '"0000000000000007"'),
    *('"\\ud800"', '"٦"', "[]", "{}", "[[]]"),
)
WORDS = (
    *(struct.pack("<f", x) for x in (float("inf"), float("nan"), -0.0, 3e38, 1e-40)),
    *(struct.pack("<i", row) for row in (-1, 0, 1, 2, 3, 2**31 - 1)),
    *(b"\x80\x7f", b"\0\x7c"),
)
NUMBER = re.compile(rb"(?<=[\[,:])-?\d+(?=[\],}])")
TEXT = re.compile(rb'(?<=:)"[^"]*"')
CHECKSUM = re.compile(rb'(?<=:")[0-9a-f]{8}(?=")')  # the base's or the seal
MEMBER = re.compile(rb'"[^"]*":("[^"]*"|\{[^{}]*\}|\[[^][]*\]),?')


def span(random: Random, data: bytes, most: int = 16) -> tuple[int, int]:
    start = random.randint(0, len(data))
    return start, min(len(data), start + random.randint(1, most))


def flipped(data: bytes, random: Random, other: bytes) -> bytes:
    if not data:
        return other
    at = random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


def inserted(data: bytes, random: Random, other: bytes) -> bytes:
    at = random.randint(0, len(data))
    return data[:at] + random.choice((b" ", b"\0", b"}", b"[", b'"', random.randbytes(8), b"[" * 2000)) + data[at:]


def deleted(data: bytes, random: Random, other: bytes) -> bytes:
    start, stop = span(random, data)
    return data[:start] + data[stop:]


def doubled(data: bytes, random: Random, other: bytes) -> bytes:
    start, stop = span(random, data, 64)
    return data[:stop] + data[start:]


def spliced(data: bytes, random: Random, other: bytes) -> bytes:
    """The beginning of one and the end of the other."""
    return data[: random.randint(0, len(data))] + other[random.randint(0, len(other)) :]


def word_placed(data: bytes, random: Random, other: bytes) -> bytes:
    """A float or a row's number that is no good, or good somewhere else, on a place for one."""
    raw = random.choice(WORDS)
    at = len(raw) * random.randint(0, len(data) // len(raw))
    return data[:at] + raw + data[at + len(raw) :]


def replaced(pattern: re.Pattern[bytes], choices: tuple[str, ...]) -> Callable[[bytes, Random, bytes], bytes]:
    """One match of the pattern in the header's text becomes one of the choices."""

    def edit(text: bytes, random: Random, other: bytes) -> bytes:
        found = list(pattern.finditer(text))
        if not found:
            return inserted(text, random, other)
        match = random.choice(found)
        return text[: match.start()] + random.choice(choices).encode() + text[match.end() :]

    return edit


def member_moved(text: bytes, random: Random, other: bytes) -> bytes:
    """A member of an object is left out, or stands again or instead somewhere else."""
    found = list(MEMBER.finditer(text))
    if not found:
        return inserted(text, random, other)
    one, at = random.choice(found), random.choice(found).start()
    if random.randrange(3):
        return text[:at] + one[0] + text[at:]
    return text[: one.start()] + text[one.end() :]


ANY = (flipped, inserted, deleted, doubled, spliced)
IN_HEADER = (
    *3 * (replaced(NUMBER, NUMBERS), replaced(TEXT, TEXTS), member_moved),
    replaced(CHECKSUM, ("01234567", "00000000")),
    *ANY,
)
IN_DATA = (*3 * (word_placed,), *ANY)


def split(message: bytes) -> tuple[bytes, bytes]:
    """The header's text and the data, by the length that is declared."""
    end = 8 + int.from_bytes(message[:8], "little")
    return message[8:end], message[end:]


def repaired(text: bytes, data: bytes) -> bytes:
    """The header's text with checksums and seal that fit, where it still has places for them."""
    try:
        metadata = sealed(json.loads(text), data)["__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return text
    for key in ("crc32c", "seal"):
        text = re.sub(rb'("%s"\s*:\s*)"[^"]*"' % key.encode(), rb'\g<1>"%s"' % metadata[key].encode(), text)
    return text


def mutated(message: bytes, random: Random, other: bytes) -> bytes:
    """``message`` after one to three changes; ``other`` is a message to take parts from."""
    for _ in range(random.randint(1, 3)):
        text, data = split(message)
        kind = random.randrange(5)
        if kind == 0:
            message = random.choice(ANY)(message, random, other)
            continue
        if kind == 1:
            data = random.choice(IN_DATA)(data, random, split(other)[1])
        elif kind > 2:
            text = random.choice(IN_HEADER)(text, random, split(other)[0])
        if random.randrange(4):
            text = repaired(text, data)
        message = file(text + b" " * (-len(text) % 8), data)
    return message
