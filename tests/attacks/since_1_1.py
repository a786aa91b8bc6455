"""Attacks on what version 1.1 has come to: int4, differences, sparse rows, and the base that they are relative to.

Rows that the good sparse messages send: of A 1, of B 0 and 2, of the head's bias none, of its gain, a scalar, its one.
"""

from __future__ import annotations

from dataclasses import replace

from .edits import (
    GAIN,
    A,
    Attack,
    B,
    float32_bytes,
    instead,
    metadata,
    no_metadata,
    payload_with,
    repacked,
    tensor,
)
from .writer import (
    FLOAT32,
    FLOAT32_SPARSE,
    INT4,
    INT4_DELTA_SPARSE,
    INT8,
    INT8_DELTA,
    Kind,
    Payload,
    file,
    numbered,
    parts,
    payloads,
    sealed,
)

SPARSE, BOTH = FLOAT32_SPARSE, INT4_DELTA_SPARSE
WIDE = "head.wide"
FAR = float32_bytes(2.0**121)  # the least that a scale may not be
INF, NAN = float32_bytes(float("inf")), float32_bytes(float("nan"))
OTHER_BASE = "01234567"


def rows(name: str, *numbers: int, kind: Kind = SPARSE) -> bytes:
    """The good message with other numbers in place of a tensor's rows, as many or more or fewer."""
    return instead(kind, f"{name}.rows", numbered(name, list(numbers)))


def resized(kind: Kind, name: str, shape: list[int], nbytes: int, code: str | None = None) -> bytes:
    """The good message with a payload of another shape, length and dtype, as its header says truly."""
    old = next(p for p in payloads(kind, (1,)) if p.name == name)
    return instead(kind, name, Payload(name, code or old.code, tuple(shape), (old.raw + b"\0" * nbytes)[:nbytes]))


def scale(raw: bytes, kind: Kind = INT4, name: str = A, number: int = 0) -> bytes:
    return payload_with(f"{name}.scale", raw, kind, 4 * number)


def in_the_name_of(kind: Kind, sent: Kind) -> bytes:
    """The payloads of one kind under the metadata of another: a schema is no secret."""
    return repacked(kind, lambda _: payloads(sent, (1,)))


def base_outside_the_seal() -> bytes:
    header, data = parts(INT8_DELTA)
    base = header["__metadata__"].pop("base")
    header = sealed(header, data)
    header["__metadata__"]["base"] = base
    return file(header, data)


def rows_last(of: list[Payload]) -> list[Payload]:
    return sorted(of, key=lambda payload: payload.name.endswith(".rows"))


BASE = [
    Attack("base-other", "BaseError", "metadata.base", metadata(kind=INT8_DELTA, base=OTHER_BASE), INT8_DELTA),
    Attack("base-other-sparse", "BaseError", "metadata.base", metadata(kind=SPARSE, base=OTHER_BASE), SPARSE),
    Attack("base-zero", "BaseError", "metadata.base", metadata(kind=BOTH, base="0" * 8), BOTH),
    Attack("base-missing", "MetadataError", "metadata.base", no_metadata("base", True, INT8_DELTA), INT8_DELTA),
    Attack("base-missing-sparse", "MetadataError", "metadata.base", no_metadata("base", True, SPARSE), SPARSE),
    Attack("base-short", "MetadataError", "metadata.base", metadata(kind=INT8_DELTA, base="1"), INT8_DELTA),
    Attack("base-upper-case", "MetadataError", "metadata.base", metadata(kind=INT8_DELTA, base="ABCDEF01"), INT8_DELTA),
    Attack("base-a-number", "MetadataError", "metadata.base", metadata(False, INT8_DELTA, base=7), INT8_DELTA),
    Attack("base-changed", "ChecksumError", "metadata.seal", metadata(False, INT8_DELTA, base=OTHER_BASE), INT8_DELTA),
    Attack("base-outside-the-seal", "ChecksumError", "metadata.seal", base_outside_the_seal(), INT8_DELTA),
]
ROWS = [
    Attack("rows-descend", "RowsError", f"{B}.rows", rows(B, 2, 0), SPARSE),
    Attack("rows-twice", "RowsError", f"{B}.rows", rows(B, 2, 2), SPARSE),
    Attack("rows-negative", "RowsError", f"{B}.rows", rows(B, -1, 2), SPARSE),
    Attack("rows-negative-where-none-came-before", "RowsError", f"{A}.rows", rows(A, -1), SPARSE),
    Attack("rows-of-a-tensor-that-sends-none", "RowsError", f"{GAIN}.rows", rows(GAIN, -1), SPARSE),
    Attack("rows-most-negative", "RowsError", f"{B}.rows", rows(B, -(2**31), 2), SPARSE),
    Attack("rows-beyond", "RowsError", f"{B}.rows", rows(B, 0, 3), SPARSE),
    Attack("rows-far-beyond", "RowsError", f"{B}.rows", rows(B, 0, 2**31 - 1), SPARSE),
    Attack("rows-of-the-next-tensor", "RowsError", f"{A}.rows", rows(A, 2), SPARSE),
    Attack("rows-of-the-tensor-before", "RowsError", f"{B}.rows", rows(B, -1, 0, kind=BOTH), BOTH),
    Attack("rows-beyond-a-scalar", "RowsError", f"{GAIN}.rows", rows(GAIN, 1, kind=BOTH), BOTH),
    Attack("rows-damaged", "ChecksumError", f"{A}.rows", payload_with(f"{A}.rows", b"\0", SPARSE, fit=False), SPARSE),
]
COUNTS = [
    Attack("rows-more-than-the-tensor", "ShapeError", f"{A}.rows.shape", rows(A, 0, 1, 2), SPARSE),
    Attack("rows-more-than-a-scalar", "ShapeError", f"{GAIN}.rows.shape", rows(GAIN, 0, 1), SPARSE),
    Attack(
        "rows-count-negative", "ShapeError", f"{A}.rows.shape", tensor(True, SPARSE, f"{A}.rows", shape=[-1]), SPARSE
    ),
    Attack(
        "rows-count-that-overflows",
        "ShapeError",
        f"{A}.rows.shape",
        tensor(True, SPARSE, f"{A}.rows", shape=[2**62]),
        SPARSE,
    ),
    Attack(
        "rows-count-of-true", "ShapeError", f"{A}.rows.shape", tensor(True, SPARSE, f"{A}.rows", shape=[True]), SPARSE
    ),
    Attack(
        "rows-in-two-axes", "ShapeError", f"{A}.rows.shape", tensor(True, SPARSE, f"{A}.rows", shape=[1, 1]), SPARSE
    ),
    Attack("rows-fewer-than-values", "ShapeError", f"{B}.shape", rows(B, 2), SPARSE),
    Attack("rows-more-than-values", "ShapeError", f"{A}.shape", rows(A, 0, 1), SPARSE),
    Attack("rows-none-but-values", "ShapeError", f"{A}.scale.shape", rows(A, kind=BOTH), BOTH),
    Attack("rows-of-a-row-more", "ShapeError", f"{B}.shape", rows(B, 0, 1, 2, kind=BOTH), BOTH),
    Attack("sparse-whole-tensor", "ShapeError", f"{A}.shape", resized(SPARSE, A, [2, 3], 24), SPARSE),
    Attack("sparse-transposed", "ShapeError", f"{A}.shape", tensor(True, SPARSE, shape=[3, 1]), SPARSE),
    Attack("sparse-scalar-without-axis", "ShapeError", f"{GAIN}.shape", tensor(True, SPARSE, GAIN, shape=[]), SPARSE),
    Attack(
        "rows-count-more-than-bytes",
        "OffsetsError",
        f"{A}.rows.data_offsets",
        tensor(True, SPARSE, f"{A}.rows", shape=[2]),
        SPARSE,
    ),
    Attack("rows-after-values", "OffsetsError", f"{A}.rows.data_offsets", repacked(SPARSE, rows_last), SPARSE),
    Attack("rows-missing", "NamesError", f"{A}.rows", instead(SPARSE, f"{A}.rows"), SPARSE),
    Attack("rows-without-values", "NamesError", A, instead(SPARSE, A), SPARSE),
    Attack("rows-of-64-bits", "DtypeError", f"{A}.rows.dtype", resized(SPARSE, f"{A}.rows", [1], 8, "I64"), SPARSE),
    Attack("rows-unsigned", "DtypeError", f"{A}.rows.dtype", tensor(True, SPARSE, f"{A}.rows", dtype="U32"), SPARSE),
]
OTHER_KINDS = [
    Attack("delta-to-a-plain-plan", "SchemaError", "metadata.schema", file(*parts(Kind(delta=True))), FLOAT32),
    Attack("sparse-to-a-plain-plan", "SchemaError", "metadata.schema", file(*parts(Kind(sparse=True))), FLOAT32),
    Attack("delta-to-a-plain-plan-int8", "SchemaError", "metadata.schema", file(*parts(Kind("int8", True))), INT8),
    *(
        Attack(name, "SchemaError", "metadata.schema", file(*parts(sent)), to)
        for name, to, sent in (
            ("plain-to-a-delta-plan", INT8_DELTA, replace(INT8_DELTA, delta=False)),
            ("sparse-to-a-delta-plan", INT8_DELTA, replace(INT8_DELTA, delta=False, sparse=True)),
            ("delta-sparse-to-a-delta-plan", INT8_DELTA, replace(INT8_DELTA, sparse=True)),
            ("plain-to-a-sparse-plan", SPARSE, replace(SPARSE, sparse=False)),
            ("delta-sparse-to-a-sparse-plan", SPARSE, replace(SPARSE, delta=True)),
            ("sparse-to-a-delta-sparse-plan", BOTH, replace(BOTH, delta=False)),
        )
    ),
    Attack(
        "plain-in-the-name-of-sparse",
        "NamesError",
        f"{A}.rows",
        in_the_name_of(SPARSE, replace(SPARSE, sparse=False)),
        SPARSE,
    ),
    Attack(
        "sparse-in-the-name-of-delta",
        "ShapeError",
        f"{A}.scale.shape",
        in_the_name_of(INT8_DELTA, replace(INT8_DELTA, sparse=True)),
        INT8_DELTA,
    ),
    Attack(
        "int8-in-the-name-of-int4",
        "ShapeError",
        f"{A}.scale.shape",
        in_the_name_of(INT4, replace(INT4, dtype="int8")),
        INT4,
    ),
    Attack("int4-version-2.0", "VersionError", "metadata.version", file(*parts(INT4, version="2.0")), INT4),
    Attack("other-round-sparse", "RoundError", "metadata.round", file(*parts(SPARSE, round=5)), SPARSE, 6),
]
INT4_LENGTHS = [
    Attack("int4-a-byte-short", "ShapeError", f"{A}.shape", resized(INT4, A, [2], 2), INT4),
    Attack("int4-a-byte-long", "ShapeError", f"{A}.shape", resized(INT4, A, [4], 4), INT4),
    Attack("int4-odd-half-byte-missing", "ShapeError", f"{WIDE}.shape", resized(INT4, WIDE, [67], 67), INT4),
    Attack("int4-a-byte-a-value", "ShapeError", f"{A}.shape", resized(INT4, A, [2, 3], 6), INT4),
    Attack("int4-signed", "DtypeError", f"{A}.dtype", tensor(kind=INT4, dtype="I8"), INT4),
    Attack("int4-scale-a-row", "ShapeError", f"{A}.scale.shape", resized(INT4, f"{A}.scale", [2], 8), INT4),
    Attack("int4-scale-short", "ShapeError", f"{WIDE}.scale.shape", resized(INT4, f"{WIDE}.scale", [2], 8), INT4),
    Attack("int4-scale-missing", "NamesError", f"{A}.scale", instead(INT4, f"{A}.scale"), INT4),
    Attack("int4-sparse-a-byte-long", "ShapeError", f"{WIDE}.shape", resized(BOTH, WIDE, [46], 46), BOTH),
    Attack("int4-damaged", "ChecksumError", WIDE, payload_with(WIDE, b"\x01", INT4, at=67, fit=False), INT4),
]
NOT_FINITE = [
    Attack("int4-scale-too-large", "NotFiniteError", f"{A}.scale", scale(FAR), INT4),
    Attack("int4-scale-too-large-negative", "NotFiniteError", f"{A}.scale", scale(float32_bytes(-(2.0**121))), INT4),
    Attack("int4-scale-infinite", "NotFiniteError", f"{WIDE}.scale", scale(INF, INT4, WIDE, 1), INT4),
    Attack("int4-scale-nan", "NotFiniteError", f"{WIDE}.scale", scale(NAN, INT4, WIDE, 2), INT4),
    Attack("int4-delta-scale-too-large", "NotFiniteError", f"{B}.scale", scale(FAR, BOTH, B), BOTH),
    Attack("delta-scale-infinite", "NotFiniteError", f"{A}.scale", scale(INF, INT8_DELTA, A, 1), INT8_DELTA),
    Attack("sparse-infinite", "NotFiniteError", B, payload_with(B, INF, SPARSE, at=4), SPARSE),
    Attack("sparse-nan", "NotFiniteError", GAIN, payload_with(GAIN, NAN, SPARSE), SPARSE),
]
LENGTH = [
    *(
        Attack(f"{kind.name}-cut", "LengthError", "length", file(*parts(kind))[:-1], kind)
        for kind in (INT4, SPARSE, BOTH)
    ),
    *(
        Attack(f"{kind.name}-extended", "LengthError", "length", file(*parts(kind)) + b"\0" * 8, kind)
        for kind in (INT4, SPARSE, BOTH)
    ),
    Attack("sparse-row-cut", "LengthError", "length", file(*parts(SPARSE))[:-180], SPARSE),  # the last row of the last
]

ATTACKS_SINCE_1_1 = (*BASE, *ROWS, *COUNTS, *OTHER_KINDS, *INT4_LENGTHS, *NOT_FINITE, *LENGTH)
