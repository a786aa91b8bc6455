"""fibecfed: Fisher-ordered curriculum federated fine-tuning of language models with LoRA, on fibecfed_kernels.

The pieces work on any PEFT model: :class:`FlatAdapter`, :func:`capture_fisher`, :func:`score_samples`,
:class:`MaskedAdamW`, :class:`MaskedSGD`. :func:`run` is the whole method over simulated devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .adapter import BrokenViewsError, FlatAdapter
from .capture import FisherCaptureError, capture_fisher
from .lora import UnsupportedModuleError
from .optim import MaskedAdamW, MaskedSGD
from .scoring import SampleScores, score_samples

if TYPE_CHECKING:
    from .config import RunConfig
    from .record import RunRecord
    from .simulation import run

__all__ = [
    "BrokenViewsError",
    "FisherCaptureError",
    "FlatAdapter",
    "MaskedAdamW",
    "MaskedSGD",
    "RunConfig",
    "RunRecord",
    "SampleScores",
    "UnsupportedModuleError",
    "capture_fisher",
    "run",
    "score_samples",
]

_LAZY = {"RunConfig": "config", "RunRecord": "record", "run": "simulation"}


def __getattr__(name: str) -> Any:
    """The driver's names on first use: they bring datasets and pydantic, which someone with a loop of their own need
    not load."""
    if name not in _LAZY:
        raise AttributeError(f"module 'fibecfed' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
