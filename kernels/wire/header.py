"""The header of a message: written once per plan, read with nothing trusted. The format is described in FORMAT.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .errors import (
    BaseError,
    ChecksumError,
    DtypeError,
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
from .format import ALIGNMENT, DIGITS, FORMAT, LENGTH_BYTES, MAJOR, Message, Payload, canonical
from .parsing import same_integers, short, text_field


class Agreed(NamedTuple):
    """What all messages of a plan say alike. based: they say what they are relative to."""

    fingerprint: str
    dtype: str
    layers: tuple[int, ...]
    based: bool
    sparse: bool

    @property
    def version(self) -> str:
        """The first version of the format that has what is used."""
        return "1.1" if self.based or self.sparse or self.dtype == "int4" else "1.0"

    @property
    def fields(self) -> dict[str, str]:
        return {"dtype": self.dtype, "layers": canonical(list(self.layers)), "schema": self.fingerprint}


class Header:
    """The header of messages with these payloads: everything but round, num_samples, base and checksums is fixed.

    ``checksum`` is the CRC32C of bytes; it is given so that this module does no arithmetic on tensors. Attributes:
    ``nbytes`` with the length field; ``limit`` of another writer's; ``template``: its bytes with zeros where a message
    has its own digits; ``places`` of these digits by name; ``seal_start``, the text that the sealed text begins with.
    """

    def __init__(self, payloads: tuple[Payload, ...], agreed: Agreed, checksum: Callable[[bytes], int]) -> None:
        self.payloads, self.agreed, self._checksum = payloads, agreed, checksum
        self.data_nbytes = payloads[-1].stop if payloads else 0
        tensors = {
            p.name: {"dtype": p.dtype.code, "shape": list(p.shape), "data_offsets": [p.start, p.stop]} for p in payloads
        }
        metadata = canonical({"format": FORMAT, "version": agreed.version, **agreed.fields})[:-1]
        text, self.places = f'{{"__metadata__":{metadata}', {}
        digits = {"round": DIGITS, "num_samples": DIGITS, "crc32c": 8 * len(payloads)}
        for name, width in {**digits, **({"base": 8} if agreed.based else {}), "seal": 8}.items():
            text += f',"{name}":"'
            self.places[name] = slice(LENGTH_BYTES + len(text), LENGTH_BYTES + len(text) + width)
            text += "0" * width + '"'
        text += f"}},{canonical(tensors, sort_keys=False)[1:]}" if tensors else "}}"
        self.nbytes = -(-(LENGTH_BYTES + len(text)) // ALIGNMENT) * ALIGNMENT
        text += " " * (self.nbytes - LENGTH_BYTES - len(text))
        self.template = (len(text)).to_bytes(LENGTH_BYTES, "little") + text.encode("ascii")
        self.limit = 4 * self.nbytes + (64 << 10)  # room for another writer's spaces and a later version's fields
        self.seal_start = f"{agreed.version} {agreed.fingerprint} "

    def write(self, message: Message, checksums: Sequence[int], base: int) -> bytes:
        """The header's bytes, its length first. base: CRC32C of what the message is relative to, if it says so."""
        own = {
            "round": f"{message.round:0{DIGITS}d}",
            "num_samples": f"{message.num_samples:0{DIGITS}d}",
            "crc32c": "".join(f"{value:08x}" for value in checksums),
        }
        if self.agreed.based:
            own["base"] = f"{base:08x}"
        header = bytearray(self.template)
        for name, text in {**own, "seal": self._seal(self.agreed.version, *own.values())}.items():
            header[self.places[name]] = text.encode("ascii")
        return bytes(header)

    def _seal(self, version: str, *own: str) -> str:
        """Checksum of the metadata that no payload's checksum covers."""
        return f"{self._checksum(' '.join((version, self.agreed.fingerprint, *own)).encode('ascii')):08x}"

    def read(self, header: dict[str, Any], data_nbytes: int, base: int) -> tuple[Message, list[int]]:
        """Message and checksums of a parsed header, after every check that needs no payload."""
        metadata = header.get("__metadata__")
        tensors = {name: info for name, info in header.items() if name != "__metadata__"}
        version = check_agreed(metadata, self.agreed)
        assert isinstance(metadata, dict)
        self._check_tensors(tensors)
        read = self._read_own(metadata, version, base)
        if data_nbytes != self.data_nbytes:
            raise LengthError("length", f"{data_nbytes} bytes of data, wanted {self.data_nbytes}")
        return read

    def _read_own(self, metadata: dict[str, Any], version: str, base: int) -> tuple[Message, list[int]]:
        """What this message alone says: round, sample count, checksums, base."""
        forms = {
            "round": rf"\d{{{DIGITS}}}",
            "num_samples": rf"\d{{{DIGITS}}}",
            "crc32c": rf"[0-9a-f]{{{8 * len(self.payloads)}}}",
            **({"base": "[0-9a-f]{8}"} if self.agreed.based else {}),
        }
        own = {name: text_field(metadata, name, form) for name, form in forms.items()}
        seal = text_field(metadata, "seal", "[0-9a-f]{8}")
        if seal != self._seal(version, *own.values()):
            raise ChecksumError("metadata.seal", f"{seal} is not the checksum of the metadata")
        if self.agreed.based and int(own["base"], 16) != base:
            raise BaseError("metadata.base", f"relative to values of CRC32C {own['base']}, those here have {base:08x}")
        crc = own["crc32c"]
        checksums = [int(crc[i : i + 8], 16) for i in range(0, len(crc), 8)]
        return Message(int(own["round"]), int(own["num_samples"])), checksums

    def _check_tensors(self, tensors: dict[str, Any]) -> None:
        for payload in self.payloads:
            info = tensors.get(payload.name)
            if info is None:
                raise NamesError(payload.name, "missing")
            if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
                raise HeaderError(payload.name, "wanted an object of dtype, shape and data_offsets")
            if info["dtype"] != payload.dtype.code:
                raise DtypeError(f"{payload.name}.dtype", f"{short(info['dtype'])}, wanted {payload.dtype.code}")
            if not same_integers(info["shape"], payload.shape):
                raise ShapeError(f"{payload.name}.shape", f"{short(info['shape'])}, wanted {list(payload.shape)}")
            if not same_integers(info["data_offsets"], (payload.start, payload.stop)):
                found, wanted = short(info["data_offsets"]), [payload.start, payload.stop]
                raise OffsetsError(f"{payload.name}.data_offsets", f"{found}, wanted {wanted}")
        if len(tensors) != len(self.payloads):
            unknown = next(iter(tensors.keys() - {p.name for p in self.payloads}))
            raise NamesError(short(unknown), "a tensor that is not in the plan")


def size_of(start: bytes, nbytes: int, limit: int) -> int:
    """Bytes of the header with its length field, from the first eight bytes of a message of ``nbytes``."""
    if nbytes < LENGTH_BYTES:
        raise LengthError("length", f"{nbytes} bytes, wanted at least {LENGTH_BYTES}")
    declared = int.from_bytes(start[:LENGTH_BYTES], "little")
    if declared > limit:
        raise HeaderError("header", f"{declared} bytes declared, wanted at most {limit}")
    if declared > nbytes - LENGTH_BYTES:
        raise LengthError("length", f"header of {declared} bytes declared, {nbytes - LENGTH_BYTES} are there")
    if declared % ALIGNMENT:
        raise HeaderError("header", f"{declared} bytes declared, wanted a multiple of {ALIGNMENT}")
    return LENGTH_BYTES + declared


def check_agreed(metadata: Any, agreed: Agreed) -> str:
    """Refuse another format, version or schema; return the version."""
    if not isinstance(metadata, dict):
        raise FormatError("metadata", "missing, wanted a fibecfed message and not just any safetensors file")
    if metadata.get("format") != FORMAT:
        raise FormatError("metadata.format", f"{short(metadata.get('format'))}, wanted {FORMAT!r}")
    version = text_field(metadata, "version", r"\d{1,4}\.\d{1,4}")
    if version.split(".")[0] != MAJOR:
        raise VersionError("metadata.version", f"{version}, this reader knows {MAJOR}.x")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise MetadataError(f"metadata.{key[:80]}", f"{short(value)}, wanted text")
    for name, wanted in agreed.fields.items():
        if metadata.get(name) != wanted:
            problem = f"{short(metadata.get(name))}, wanted {short(wanted)}"
            if name == "schema":
                problem += ": of another base model, adapter or kind of plan; compare flat.identity at both ends"
            raise SchemaError(f"metadata.{name}", problem)
    return version
