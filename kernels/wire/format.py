"""The header of a message: written once per plan, read with nothing trusted. The format is described in FORMAT.md."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..layout import Entry
from .errors import (
    ChecksumError,
    DtypeError,
    DuplicateKeyError,
    FormatError,
    HeaderError,
    LengthError,
    MetadataError,
    NamesError,
    OffsetsError,
    SchemaError,
    ShapeError,
    VersionError,
)

FORMAT, VERSION, MAJOR = "fibecfed", "1.0", "1"
ALIGNMENT = 8  # of the data, in bytes from the start of the message
DIGITS = 16  # of round and num_samples, so that every header of a plan has the same length
LENGTH_BYTES = 8  # of the header's length, little-endian, at the start of the file


class WireDtype(NamedTuple):
    """A dtype on the wire: its code in safetensors, in torch, and the kind of range for wire_digest."""

    code: str
    torch: torch.dtype
    kind: int


DTYPES = {
    "float32": WireDtype("F32", torch.float32, 1),
    "bfloat16": WireDtype("BF16", torch.bfloat16, 2),
    "float16": WireDtype("F16", torch.float16, 3),
    "int8": WireDtype("I8", torch.int8, 0),
}


class Payload(NamedTuple):
    """One tensor of a message: name, dtype, shape, and its bytes [start, stop) of the data."""

    name: str
    dtype: WireDtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Message(NamedTuple):
    """What a message says of itself: the round it belongs to and the samples its sender trained on."""

    round: int
    num_samples: int


def payloads_of(entries: Sequence[Entry], dtype: WireDtype) -> tuple[Payload, ...]:
    """The tensors of a message in the order of their bytes: int8's scales first, so that all is aligned."""
    wanted: list[tuple[str, WireDtype, tuple[int, ...]]] = [(e.name, dtype, e.shape) for e in entries]
    if dtype.code == "I8":
        wanted = [(f"{e.name}.scale", DTYPES["float32"], (e.rows,)) for e in entries] + wanted
    payloads, start = [], 0
    for name, kind, shape in wanted:
        numel = torch.Size(shape).numel()
        payloads.append(Payload(name, kind, shape, start, start + numel * kind.torch.itemsize))
        start = payloads[-1].stop
    return tuple(payloads)


def fingerprint_of(identity: Mapping[str, str], entries: Sequence[Entry], layers: Sequence[int], dtype: str) -> str:
    """SHA-256 (hex) of the canonical JSON of what sender and receiver must agree on."""
    agreed = {
        "dtype": dtype,
        "identity": dict(identity),
        "layers": list(layers),
        "tensors": [[e.name, list(e.shape)] for e in entries],
    }
    return hashlib.sha256(_canonical(agreed).encode("ascii")).hexdigest()


class Header:
    """The header that a plan's messages have: everything but round, num_samples and checksums is fixed.

    ``checksum`` is the CRC32C of bytes; it is given so that this module does no arithmetic on tensors.
    """

    def __init__(
        self,
        payloads: tuple[Payload, ...],
        fingerprint: str,
        dtype: str,
        layers: Sequence[int],
        checksum: Callable[[bytes], int],
    ) -> None:
        self.payloads, self.fingerprint, self._checksum = payloads, fingerprint, checksum
        self.data_nbytes = payloads[-1].stop if payloads else 0
        self._fixed = {"dtype": dtype, "layers": _canonical(list(layers)), "schema": fingerprint}
        metadata = _canonical({"format": FORMAT, "version": VERSION, **self._fixed})[:-1]
        tensors = {
            p.name: {"dtype": p.dtype.code, "shape": list(p.shape), "data_offsets": [p.start, p.stop]} for p in payloads
        }
        self._before = f'{{"__metadata__":{metadata},'
        self._after = f"}},{_canonical(tensors, sort_keys=False)[1:]}" if tensors else "}}"
        unpadded = LENGTH_BYTES + len(self._before + self._variable(0, 0, [0] * len(payloads)) + self._after)
        self.nbytes = -(-unpadded // ALIGNMENT) * ALIGNMENT
        self._after += " " * (self.nbytes - unpadded)
        self.limit = 4 * self.nbytes + (64 << 10)  # room for another writer's spaces and a later version's fields

    def write(self, round: int, num_samples: int, checksums: Sequence[int]) -> bytes:
        """The header's bytes, its length first."""
        text = self._before + self._variable(round, num_samples, checksums) + self._after
        return (self.nbytes - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little") + text.encode("ascii")

    def peek(self, header: bytes) -> Message | None:
        """round and num_samples, unchecked, of a header laid out as ours; None when they are not where ours are."""
        at = LENGTH_BYTES + len(self._before)
        found = re.compile(rb'"round":"([0-9]{16})","num_samples":"([0-9]{16})"').match(header, at)
        return Message(int(found[1]), int(found[2])) if found else None

    def _variable(self, round: int, num_samples: int, checksums: Sequence[int]) -> str:
        at, samples = f"{round:0{DIGITS}d}", f"{num_samples:0{DIGITS}d}"
        crc = "".join(f"{value:08x}" for value in checksums)
        seal = self._seal(VERSION, at, samples, crc)
        return f'"round":"{at}","num_samples":"{samples}","crc32c":"{crc}","seal":"{seal}"'

    def _seal(self, version: str, round: str, num_samples: str, crc: str) -> str:
        """Checksum of the metadata that no payload's checksum covers."""
        return f"{self._checksum(f'{version} {self.fingerprint} {round} {num_samples} {crc}'.encode('ascii')):08x}"

    def size_of(self, start: bytes, nbytes: int) -> int:
        """Bytes of the header with its length field, from the first eight bytes of a message of ``nbytes``."""
        if nbytes < LENGTH_BYTES:
            raise LengthError("length", f"{nbytes} bytes, wanted at least {LENGTH_BYTES}")
        declared = int.from_bytes(start[:LENGTH_BYTES], "little")
        if declared > self.limit:
            raise HeaderError("header", f"{declared} bytes declared, wanted at most {self.limit}")
        if declared > nbytes - LENGTH_BYTES:
            raise LengthError("length", f"header of {declared} bytes declared, {nbytes - LENGTH_BYTES} are there")
        if declared % ALIGNMENT:
            raise HeaderError("header", f"{declared} bytes declared, wanted a multiple of {ALIGNMENT}")
        return LENGTH_BYTES + declared

    def read(self, text: bytes, data_nbytes: int) -> tuple[Message, list[int]]:
        """What a header says, after every check that needs no payload; ``text`` is without its length field."""
        header = _parse(text)
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict):
            raise FormatError("metadata", "missing, wanted a fibecfed message and not just any safetensors file")
        version = self._check_agreed(metadata)
        self._check_tensors(header)
        message, checksums = self._read_own(metadata, version)
        if data_nbytes != self.data_nbytes:
            raise LengthError("length", f"{data_nbytes} bytes of data, wanted {self.data_nbytes}")
        return message, checksums

    def _check_agreed(self, metadata: dict[str, Any]) -> str:
        """Refuse another format, version or schema; return the version."""
        if metadata.get("format") != FORMAT:
            raise FormatError("metadata.format", f"{_short(metadata.get('format'))}, wanted {FORMAT!r}")
        version = _field(metadata, "version", r"\d{1,4}\.\d{1,4}")
        if version.split(".")[0] != MAJOR:
            raise VersionError("metadata.version", f"{version}, this reader knows {MAJOR}.x")
        for name, wanted in self._fixed.items():
            if metadata.get(name) != wanted:
                raise SchemaError(f"metadata.{name}", f"{_short(metadata.get(name))}, wanted {_short(wanted)}")
        return version

    def _read_own(self, metadata: dict[str, Any], version: str) -> tuple[Message, list[int]]:
        """What this message alone says: round, sample count, checksums."""
        round, num_samples = (_field(metadata, name, rf"\d{{{DIGITS}}}") for name in ("round", "num_samples"))
        crc = _field(metadata, "crc32c", rf"[0-9a-f]{{{8 * len(self.payloads)}}}")
        seal = _field(metadata, "seal", "[0-9a-f]{8}")
        if seal != self._seal(version, round, num_samples, crc):
            raise ChecksumError("metadata.seal", f"{seal} is not the checksum of the metadata")
        return Message(int(round), int(num_samples)), [int(crc[i : i + 8], 16) for i in range(0, len(crc), 8)]

    def _check_tensors(self, tensors: dict[str, Any]) -> None:
        for payload in self.payloads:
            info = tensors.get(payload.name)
            if info is None:
                raise NamesError(payload.name, "missing")
            if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
                raise HeaderError(payload.name, "wanted an object of dtype, shape and data_offsets")
            if info["dtype"] != payload.dtype.code:
                raise DtypeError(f"{payload.name}.dtype", f"{_short(info['dtype'])}, wanted {payload.dtype.code}")
            if not _same_integers(info["shape"], payload.shape):
                raise ShapeError(f"{payload.name}.shape", f"{_short(info['shape'])}, wanted {list(payload.shape)}")
            if not _same_integers(info["data_offsets"], (payload.start, payload.stop)):
                found, wanted = _short(info["data_offsets"]), [payload.start, payload.stop]
                raise OffsetsError(f"{payload.name}.data_offsets", f"{found}, wanted {wanted}")
        if len(tensors) != len(self.payloads):
            unknown = next(iter(tensors.keys() - {p.name for p in self.payloads}))
            raise NamesError(_short(unknown), "a tensor that is not in the plan")


def _field(metadata: dict[str, Any], name: str, form: str) -> str:
    value = metadata.get(name)
    if not isinstance(value, str) or not re.fullmatch(form, value, re.ASCII):
        raise MetadataError(f"metadata.{name}", f"{_short(value)}, wanted text of the form {form}")
    return value


def _parse(text: bytes) -> dict[str, Any]:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DuplicateKeyError("header", f"key {_short(twice)} stands twice")
        return result

    def refuse(number: str) -> Any:
        raise HeaderError("header", f"number {_short(number)}, wanted only integers")

    def integer(digits: str) -> int:
        return int(digits) if len(digits) <= 19 else refuse(digits)

    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=distinct,
            parse_int=integer,
            parse_float=refuse,
            parse_constant=refuse,
        )
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError("header", f"not JSON: {_short(str(error))}") from None
    if not isinstance(header, dict):
        raise HeaderError("header", f"{type(header).__name__}, wanted a JSON object")
    return header


def _canonical(value: Any, sort_keys: bool = True) -> str:
    return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=True)


def _same_integers(found: Any, wanted: tuple[int, ...]) -> bool:
    """Equal as lists of integers; JSON's true is not 1."""
    return isinstance(found, list) and all(type(v) is int for v in found) and found == list(wanted)


def _short(value: object) -> str:
    """What a message holds, cut to a length fit for an error; nested values by their type only, they may be deep."""
    if isinstance(value, list) and all(type(v) is int for v in value):
        text = repr(value[:20])
    else:
        text = (
            repr(value[:80] if isinstance(value, str) else value)
            if not isinstance(value, list | dict)
            else type(value).__name__
        )
    return text if len(text) <= 80 else f"{text[:77]}…"
