"""Every message that must be refused: what is wrong with it, and what the refusal says. Writes the files beside it:

    python -m tests.attacks.make

A message is right in all but the one thing that its name tells, checksums and seal included where an attacker could
make them so. The receiver's plan is the tiny adapter's (writer.py) with block 1, of the attack's kind. Here are those
of version 1.0; since_1_1.py has the others.
"""

from __future__ import annotations

from pathlib import Path

from .edits import (
    A_BYTES,
    DATA,
    GAIN,
    GOOD,
    HEADER_END,
    TEXT,
    A,
    Attack,
    B,
    data_with,
    float32_bytes,
    header_with,
    metadata,
    no_metadata,
    overlapping,
    permuted,
    tensor,
    text_with,
    with_hole,
)
from .since_1_1 import ATTACKS_SINCE_1_1
from .writer import BFLOAT16, FLOAT16, INT8, file, parts

FOLDER = Path(__file__).parent
INF, NAN = float("inf"), float("nan")
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

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
    Attack("other-dtype", "SchemaError", "metadata.dtype", file(*parts(FLOAT16))),
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
    Attack("dtype-unsigned", "DtypeError", f"{A}.dtype", tensor(kind=INT8, dtype="U8"), INT8),
    Attack("wrong-shape", "ShapeError", f"{A}.shape", tensor(shape=[3, 2])),
    Attack(  # the only payload of shape [1]
        "shape-of-true",
        "ShapeError",
        f"{GAIN}.scale.shape",
        tensor(kind=INT8, name=f"{GAIN}.scale", shape=[True]),
        INT8,
    ),
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
    Attack("bad-scale", "ChecksumError", f"{A}.scale", data_with(0, b"\x01", False, INT8), INT8),
]
NOT_FINITE = [
    Attack("infinite", "NotFiniteError", A, data_with(4, float32_bytes(-INF))),
    Attack("nan", "NotFiniteError", GAIN, data_with(56, float32_bytes(NAN))),
    Attack("nan-signalling", "NotFiniteError", A, data_with(0, b"\x01\0\x80\x7f")),
    Attack("infinite-bfloat16", "NotFiniteError", A, data_with(2, b"\x80\x7f", kind=BFLOAT16), BFLOAT16),
    Attack("nan-float16", "NotFiniteError", A, data_with(2, b"\x01\x7c", kind=FLOAT16), FLOAT16),
    Attack("int8-scale-infinite", "NotFiniteError", f"{A}.scale", data_with(4, float32_bytes(INF), kind=INT8), INT8),
    Attack("int8-scale-nan", "NotFiniteError", f"{A}.scale", data_with(0, float32_bytes(NAN), kind=INT8), INT8),
    Attack("int8-scale-too-large", "NotFiniteError", f"{A}.scale", data_with(0, float32_bytes(3e38), kind=INT8), INT8),
]
ROUND = [Attack("other-round", "RoundError", "metadata.round", file(*parts(round=5)), round=6)]

ATTACKS_OF_1_0 = (
    *(*LENGTH, *HEADER, *DUPLICATE, *METADATA, *SCHEMA),
    *(*TENSORS, *OFFSETS, *CHECKSUM, *NOT_FINITE, *ROUND),
)
ATTACKS = (*ATTACKS_OF_1_0, *ATTACKS_SINCE_1_1)


def main() -> None:
    for old in FOLDER.glob("*.safetensors"):
        old.unlink()
    for attack in ATTACKS:
        (FOLDER / f"{attack.name}.safetensors").write_bytes(attack.message)


if __name__ == "__main__":
    main()
