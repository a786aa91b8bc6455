"""Every message that must be refused: what is wrong with it, and what the refusal says. Writes the files beside it:

    python -m tests.attacks.make

A message is right in all but the one thing that its name tells, checksums and seal included where an attacker could
make them so. The receiver's plan is the tiny adapter's (writer.py) with block 1, in the attack's dtype.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .writer import Parts, file, parts, sealed

FOLDER = Path(__file__).parent
A, B = "block.1.lora_A.weight", "block.1.lora_B.weight"
GAIN = "head.gain"
A_BYTES = 24  # of A's payload in float32, which starts the data; B's follows
Header = dict[str, Any]
GOOD = file(*parts())
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")
TEXT, DATA = GOOD[8:HEADER_END], GOOD[HEADER_END:]


@dataclass(frozen=True)
class Attack:
    """One file: ``name``.safetensors, the WireError class and field of its refusal, its bytes, its receiver."""

    name: str
    error: str
    field: str
    message: bytes
    dtype: str = "float32"
    round: int | None = None  # that the receiver asks for


def header_with(edit: Callable[[Header], object], fit: bool = True, dtype: str = "float32") -> bytes:
    """The good message with its header changed; ``fit``: checksums and seal are made to fit afterwards."""
    header, data = parts(dtype)
    edit(header)
    return file(sealed(header, data) if fit else header, data)


def metadata(fit: bool = True, **fields: Any) -> bytes:
    return header_with(lambda header: header["__metadata__"].update(fields), fit)


def no_metadata(key: str) -> bytes:
    return header_with(lambda header: header["__metadata__"].pop(key), fit=False)


def tensor(fit: bool = True, to: str = "float32", **fields: Any) -> bytes:
    return header_with(lambda header: header[A].update(fields), fit, to)


def gain_scale(**fields: Any) -> bytes:
    """Of int8's one scale of a scalar, the only payload of shape [1]."""
    return header_with(lambda header: header[f"{GAIN}.scale"].update(fields), dtype="int8")


def text_with(old: str, new: str) -> bytes:
    """The good message with the first ``old`` in its header's text replaced, and padded again."""
    changed = TEXT.rstrip(b" ").replace(old.encode(), new.encode(), 1)
    assert old.encode() in TEXT
    return file(changed + b" " * (-len(changed) % 8), DATA)


def data_with(at: int, raw: bytes, fit: bool = True, dtype: str = "float32") -> bytes:
    """The good message with the data's bytes from ``at`` on replaced by ``raw``."""
    header, data = parts(dtype)
    data = data[:at] + raw + data[at + len(raw) :]
    return file(sealed(header, data) if fit else header, data)


def float32_bytes(x: float) -> bytes:
    return struct.pack("<f", x)


def permuted() -> Parts:
    """A and B have changed places in the data, and the header says so truly."""
    header, data = parts()
    header[B]["data_offsets"], header[A]["data_offsets"] = [0, A_BYTES], [A_BYTES, 2 * A_BYTES]
    data = data[A_BYTES : 2 * A_BYTES] + data[:A_BYTES] + data[2 * A_BYTES :]
    return sealed(header, data), data


def with_hole() -> Parts:
    """Eight bytes before B that belong to no tensor: room to hide something in."""
    header, data = parts()
    for name, info in header.items():
        if name not in ("__metadata__", A):
            info["data_offsets"] = [offset + 8 for offset in info["data_offsets"]]
    data = data[:A_BYTES] + b"\xaa" * 8 + data[A_BYTES:]
    return sealed(header, data), data


def overlapping() -> Parts:
    """B reads A's bytes again, and the data is shorter by as much."""
    header, data = parts()
    for name, info in header.items():
        if name not in ("__metadata__", A):
            info["data_offsets"] = [offset - A_BYTES for offset in info["data_offsets"]]
    data = data[:A_BYTES] + data[2 * A_BYTES :]
    return sealed(header, data), data


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
INF, NAN = float("inf"), float("nan")

LENGTH = [
    Attack("empty", "LengthError", "length", b""),
    Attack("seven-bytes", "LengthError", "length", GOOD[:7]),
    Attack("truncated-header", "LengthError", "length", GOOD[: HEADER_END // 2]),
    Attack("header-alone", "LengthError", "length", GOOD[:HEADER_END]),
    Attack("cut-data", "LengthError", "length", GOOD[:-4]),
    Attack("trailing-bytes", "LengthError", "length", GOOD + b"\0" * 8),
    Attack("two-messages", "LengthError", "length", GOOD + GOOD),
]
HEADER = [
    Attack("oversized-header", "HeaderError", "header", file(b"{}      ", declared=2**60)),
    Attack("oversized-header-2-64", "HeaderError", "header", file(b"{}      ", declared=2**64 - 1)),
    Attack("header-not-aligned", "HeaderError", "header", file(TEXT + b" ", DATA)),
    Attack("header-of-nothing", "HeaderError", "header", file(b"")),
    Attack("header-of-spaces", "HeaderError", "header", file(b" " * 64)),
    Attack("bad-json", "HeaderError", "header", file(b'{"a": [1, 2, 3 ')),
    Attack("json-and-more", "HeaderError", "header", text_with("]}}", "]}}}")),
    Attack("padded-with-nul", "HeaderError", "header", file(TEXT + b"\0" * 8, DATA)),
    Attack("comment", "HeaderError", "header", text_with("{", "{/**/")),
    Attack("byte-order-mark", "HeaderError", "header", text_with("{", "\ufeff{")),
    Attack("not-an-object", "HeaderError", "header", file(b"[1, 2]  ")),
    Attack("null", "HeaderError", "header", file(b"null    ")),
    Attack("invalid-utf-8", "HeaderError", "header", file(b'{"\xc3\x28":0}')),
    Attack("utf-16", "HeaderError", "header", file("{}  ".encode("utf-16-le"))),
    Attack("deep-nesting", "HeaderError", "header", file(b"[" * 4096)),  # never closed: at no depth is it JSON
    Attack("float-number", "HeaderError", "header", text_with("[2,3]", "[2.0,3]")),
    Attack("exponent", "HeaderError", "header", text_with("[2,3]", "[2e0,3]")),
    Attack("huge-number", "HeaderError", "header", text_with("[2,3]", f"[{10**40},3]")),
    Attack("nan-number", "HeaderError", "header", text_with("[2,3]", "[NaN,3]")),
    Attack("minus-zero", "HeaderError", "header", text_with("[0,24]", "[-0,24]")),
    Attack("lone-surrogate", "HeaderError", "header", metadata(note="\ud800")),
    Attack("infinite-number", "HeaderError", "header", text_with("[2,3]", "[-Infinity,3]")),
    Attack("tensor-not-an-object", "HeaderError", A, header_with(lambda h: h.update({A: [1]}), fit=False)),
    Attack("tensor-with-strides", "HeaderError", A, tensor(stride=[3, 1])),
    Attack("tensor-without-shape", "HeaderError", A, header_with(lambda h: h[A].pop("shape"))),
]
DUPLICATE = [
    Attack("duplicate-tensor", "DuplicateKeyError", "header", text_with('"block', f'"{A}":0,"block')),
    Attack("duplicate-escaped", "DuplicateKeyError", "header", text_with('"block', f'"\\u0062{A[1:]}":0,"block')),
    Attack("duplicate-metadata", "DuplicateKeyError", "header", text_with("{", '{"__metadata__":{},')),
    Attack("duplicate-in-metadata", "DuplicateKeyError", "header", text_with('"round"', '"round":"","round"')),
    Attack("duplicate-in-tensor", "DuplicateKeyError", "header", text_with('"shape"', '"shape":[],"shape"')),
]
METADATA = [
    Attack("missing-metadata", "FormatError", "metadata", header_with(lambda h: h.pop("__metadata__"), fit=False)),
    Attack("metadata-a-list", "FormatError", "metadata", header_with(lambda h: h.update(__metadata__=[]), fit=False)),
    Attack("other-format", "FormatError", "metadata.format", metadata(format="pt")),
    Attack("no-format", "FormatError", "metadata.format", no_metadata("format")),
    Attack("version-2.0", "VersionError", "metadata.version", file(*parts(version="2.0"))),
    Attack("version-0.9", "VersionError", "metadata.version", file(*parts(version="0.9"))),
    Attack("version-10.0", "VersionError", "metadata.version", file(*parts(version="10.0"))),
    Attack("version-of-one-number", "MetadataError", "metadata.version", file(*parts(version="1"))),
    Attack("version-of-three", "MetadataError", "metadata.version", file(*parts(version="1.0.0"))),
    Attack("version-and-newline", "MetadataError", "metadata.version", file(*parts(version="1.0\n"))),
    Attack("round-short", "MetadataError", "metadata.round", metadata(round="6")),
    Attack("round-negative", "MetadataError", "metadata.round", metadata(round="-000000000000006")),
    Attack("round-in-other-digits", "MetadataError", "metadata.round", metadata(round="٠" * 15 + "٦")),
    Attack("samples-a-number", "MetadataError", "metadata.num_samples", metadata(fit=False, num_samples=77)),
    Attack("checksums-too-few", "MetadataError", "metadata.crc32c", metadata(fit=False, crc32c="0" * 8)),
    Attack("checksums-upper-case", "MetadataError", "metadata.crc32c", metadata(fit=False, crc32c="ABCDEF01" * 4)),
    Attack("no-seal", "MetadataError", "metadata.seal", no_metadata("seal")),
    Attack("metadata-not-text", "MetadataError", "metadata.note", metadata(note=[[7]])),
]
SCHEMA = [
    Attack("other-dtype", "SchemaError", "metadata.dtype", file(*parts("float16"))),
    Attack("other-layers", "SchemaError", "metadata.layers", file(*parts(layers=(0,)))),
    Attack("other-adapter", "SchemaError", "metadata.schema", file(*parts(identity={"model": "another"}))),
    Attack("no-schema", "SchemaError", "metadata.schema", no_metadata("schema")),
]
TENSORS = [
    Attack("missing-tensor", "NamesError", A, header_with(lambda h: h.pop(A))),
    Attack("renamed-tensor", "NamesError", A, header_with(lambda h: h.update(other=h.pop(A)))),
    Attack("unknown-tensor", "NamesError", "'other'", header_with(lambda h: h.update(other=EMPTY), fit=False)),
    Attack("wrong-dtype", "DtypeError", f"{A}.dtype", tensor(dtype="I32")),
    Attack("dtype-in-lower-case", "DtypeError", f"{A}.dtype", tensor(dtype="f32")),
    Attack("dtype-unsigned", "DtypeError", f"{A}.dtype", tensor(to="int8", dtype="U8"), "int8"),
    Attack("wrong-shape", "ShapeError", f"{A}.shape", tensor(shape=[3, 2])),
    Attack("shape-of-true", "ShapeError", f"{GAIN}.scale.shape", gain_scale(shape=[True]), "int8"),
    Attack("shape-that-overflows", "ShapeError", f"{A}.shape", tensor(shape=[2**62, 4])),
]
OFFSETS = [
    Attack("overlap", "OffsetsError", f"{B}.data_offsets", file(*overlapping())),
    Attack("hole", "OffsetsError", f"{B}.data_offsets", file(*with_hole())),
    Attack("permuted", "OffsetsError", f"{A}.data_offsets", file(*permuted())),
    Attack("offsets-reversed", "OffsetsError", f"{A}.data_offsets", tensor(fit=False, data_offsets=[24, 0])),
    Attack("offsets-negative", "OffsetsError", f"{A}.data_offsets", tensor(fit=False, data_offsets=[-24, 0])),
    Attack("offsets-of-false", "OffsetsError", f"{A}.data_offsets", tensor(data_offsets=[False, A_BYTES])),
    Attack("offsets-far", "OffsetsError", f"{A}.data_offsets", tensor(fit=False, data_offsets=[2**60, 2**60 + 24])),
]
CHECKSUM = [
    Attack("bad-seal", "ChecksumError", "metadata.seal", metadata(fit=False, seal="0" * 8)),
    Attack("round-changed", "ChecksumError", "metadata.seal", metadata(fit=False, round=f"{7:016d}")),
    Attack("minor-version-changed", "ChecksumError", "metadata.seal", metadata(fit=False, version="1.7")),
    Attack("bad-payload", "ChecksumError", A, data_with(0, b"\x01", fit=False)),
    Attack("bad-last-payload", "ChecksumError", GAIN, data_with(56, b"\x01", fit=False)),
    Attack("bad-scale", "ChecksumError", f"{A}.scale", data_with(0, b"\x01", False, "int8"), "int8"),
]
NOT_FINITE = [
    Attack("infinite", "NotFiniteError", A, data_with(4, float32_bytes(-INF))),
    Attack("nan", "NotFiniteError", GAIN, data_with(56, float32_bytes(NAN))),
    Attack("nan-signalling", "NotFiniteError", A, data_with(0, b"\x01\0\x80\x7f")),
    Attack("infinite-bfloat16", "NotFiniteError", A, data_with(2, b"\x80\x7f", dtype="bfloat16"), "bfloat16"),
    Attack("nan-float16", "NotFiniteError", A, data_with(2, b"\x01\x7c", dtype="float16"), "float16"),
    Attack(
        "int8-scale-infinite", "NotFiniteError", f"{A}.scale", data_with(4, float32_bytes(INF), dtype="int8"), "int8"
    ),
    Attack("int8-scale-nan", "NotFiniteError", f"{A}.scale", data_with(0, float32_bytes(NAN), dtype="int8"), "int8"),
    Attack(
        "int8-scale-too-large",
        "NotFiniteError",
        f"{A}.scale",
        data_with(0, float32_bytes(3e38), dtype="int8"),
        "int8",
    ),
]
ROUND = [Attack("other-round", "RoundError", "metadata.round", file(*parts(round=5)), round=6)]

ATTACKS = (*LENGTH, *HEADER, *DUPLICATE, *METADATA, *SCHEMA, *TENSORS, *OFFSETS, *CHECKSUM, *NOT_FINITE, *ROUND)


def main() -> None:
    for old in FOLDER.glob("*.safetensors"):
        old.unlink()
    for attack in ATTACKS:
        (FOLDER / f"{attack.name}.safetensors").write_bytes(attack.message)


if __name__ == "__main__":
    main()
