"""fibecfed: Fisher-ordered curriculum federated fine-tuning of language models with LoRA, on fibecfed_kernels.

The pieces work on any PEFT model: :class:`FlatAdapter`, :func:`capture_fisher`, :func:`score_samples`,
:class:`MaskedAdamW`, :class:`MaskedSGD`, :func:`dp_step`. :func:`run` is the whole method over simulated devices,
:func:`resume` goes on with an interrupted run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import BrokenViewsError, FlatAdapter
    from .capture import FisherCaptureError, capture_fisher
    from .clipping import clip_sample_gradients
    from .config import ConfigError, RunConfig, load_config
    from .lora import UnsupportedModuleError
    from .optim import MaskedAdamW, MaskedSGD
    from .privacy import DpStep, dp_step
    from .record import RunRecord
    from .sample_axis import check_sample_axis
    from .scoring import NotFiniteScoresError, SampleScores, score_samples
    from .simulation import resume, run

__all__ = [
    "BrokenViewsError",
    "ConfigError",
    "DpStep",
    "FisherCaptureError",
    "FlatAdapter",
    "MaskedAdamW",
    "MaskedSGD",
    "NotFiniteScoresError",
    "RunConfig",
    "RunRecord",
    "SampleScores",
    "UnsupportedModuleError",
    "capture_fisher",
    "check_sample_axis",
    "clip_sample_gradients",
    "dp_step",
    "load_config",
    "resume",
    "run",
    "score_samples",
]

_ROOMS = {
    "adapter": ("BrokenViewsError", "FlatAdapter"),
    "capture": ("FisherCaptureError", "capture_fisher"),
    "clipping": ("clip_sample_gradients",),
    "config": ("ConfigError", "RunConfig", "load_config"),
    "lora": ("UnsupportedModuleError",),
    "optim": ("MaskedAdamW", "MaskedSGD"),
    "privacy": ("DpStep", "dp_step"),
    "record": ("RunRecord",),
    "sample_axis": ("check_sample_axis",),
    "scoring": ("NotFiniteScoresError", "SampleScores", "score_samples"),
    "simulation": ("resume", "run"),
}


def __getattr__(name: str) -> Any:
    """The names on first use: torch, peft and datasets take seconds to import, and `fibecfed --help` needs none."""
    from importlib import import_module

    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f".{room}", __name__), name)
    raise AttributeError(f"module 'fibecfed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
