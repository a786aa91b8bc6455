"""From a wire op's name to the body that runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _ops  # noqa: F401  the schemas must exist before a body is called
from .._backend import body_for
from . import reference


def run(name: str, device_of: Tensor, *args: Any) -> None:
    """Run the op ``name``, which changes some of its arguments, where ``device_of`` is."""
    match body_for(device_of):
        case "reference":
            getattr(reference, name)(*args)
        case "triton" if not torch.compiler.is_compiling():
            from . import triton as body  # importing Triton costs time that CPU users need not pay

            getattr(body, name)(*args)  # past the Python op boundary: ~60 µs a call on the host
        case _:
            getattr(torch.ops.fibecfed, name)(*args)


def digest(buffer: Tensor, ranges: Tensor) -> tuple[list[int], list[bool]]:
    """By range: CRC32C of buffer[start:stop], and whether a float in it is not finite. A message is in host memory."""
    op = reference.wire_digest if body_for(buffer) == "reference" else torch.ops.fibecfed.wire_digest
    lines = op(buffer, ranges).tolist()
    return [crc for crc, _ in lines], [bool(found) for _, found in lines]


def crc32c(data: bytes) -> int:
    """CRC32C (Castagnoli, RFC 3720) of bytes."""
    if not data:
        return 0
    return digest(torch.frombuffer(bytearray(data), dtype=torch.uint8), torch.tensor([[0, len(data), 0]]))[0][0]
