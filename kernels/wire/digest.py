"""Checksums of bytes in host memory, by whichever body runs there."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  the schemas must exist before a body is called
from .._backend import backend
from . import reference


def digest(buffer: Tensor, ranges: Tensor) -> tuple[list[int], list[bool]]:
    """By range: CRC32C of buffer[start:stop], and whether a float in it is not finite, or a scale too large."""
    # Triton, where it is forced, has no body for the host's memory
    op = reference.wire_digest if backend("cpu") == "reference" else torch.ops.fibecfed.wire_digest.default
    lines = op(buffer, ranges).tolist()
    return [crc for crc, _ in lines], [bool(found) for _, found in lines]


def crc32c(data: bytes) -> int:
    """CRC32C (Castagnoli, RFC 3720) of bytes."""
    if not data:
        return 0
    return digest(torch.frombuffer(bytearray(data), dtype=torch.uint8), torch.tensor([[0, len(data), 0]]))[0][0]


def digest_of(values: Tensor) -> tuple[int, bool]:
    """CRC32C of float32 values as they lie in memory, and whether all are finite."""
    raw = values.cpu().view(torch.uint8)
    (crc,), (bad,) = digest(raw, torch.tensor([[0, len(raw), 1]]))
    return crc, not bad
