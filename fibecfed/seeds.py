"""Random streams named by what they are for: any choice can be made again without replaying those before it."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def stream(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A numpy generator for (seed, purpose, indices), e.g. ``stream(42, "draw", round)``."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *indices])


def torch_stream(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """A CPU torch generator for (seed, purpose, indices)."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, *indices))


def torch_seed(seed: int, purpose: str, *indices: int) -> int:
    """An integer seed for (seed, purpose, indices), for torch.manual_seed."""
    return int(stream(seed, purpose, *indices).integers(2**63))
