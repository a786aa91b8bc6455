"""Messages of released versions of the wire format, and the values that they stand for."""

from __future__ import annotations

from pathlib import Path

from tests.attacks.writer import Kind

FOLDER = Path(__file__).parent


def golden(kind: Kind) -> bytes:
    """The tiny adapter's message of this kind: all layers, round 6, 77 samples; sparse: writer.ROWS."""
    return (FOLDER / kind.version / f"{kind.name}.safetensors").read_bytes()
