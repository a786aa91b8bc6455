"""Which body of an op runs: "cpp" on the CPU, "triton" on CUDA, "reference" (pure torch) anywhere else or when
forced."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal, cast

import torch

Backend = Literal["reference", "cpp", "triton"]
BACKENDS: tuple[Backend, ...] = ("reference", "cpp", "triton")

HAS_TRITON = importlib.util.find_spec("triton") is not None

try:
    from . import _C  # noqa: F401  registers the CPU bodies with torch.library

    HAS_CPP = True
except ImportError as error:
    HAS_CPP = False
    if importlib.util.find_spec(f"{__package__}._C") is not None:
        warnings.warn(
            f"the C++ extension fibecfed_kernels._C cannot be loaded ({error}); ops on the CPU run their reference. "
            "Build it again with the torch that is installed",
            stacklevel=2,
        )

_forced: ContextVar[Backend | None] = ContextVar("fibecfed_kernels_backend", default=None)


def backend(device: torch.device | str = "cpu") -> Backend:
    """The body that an op on tensors of ``device`` runs now: ``"cpp"``, ``"triton"`` or ``"reference"``.

    CPU: C++ if the extension was built, else the reference. CUDA: Triton if installed, else the reference. Other
    devices: the reference. :func:`use_backend` overrides.
    """
    forced = _forced.get()
    if forced is not None:
        return forced
    kind = torch.device(device).type
    if kind == "cpu" and HAS_CPP:
        return "cpp"
    if kind == "cuda" and HAS_TRITON:
        return "triton"
    return "reference"


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Force one body for every op called inside the block (this thread or task only).

    Raises ValueError for an unknown name and RuntimeError when the body is not available here.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: {name!r} is unknown, wanted one of {', '.join(BACKENDS)}")
    if name == "cpp" and not HAS_CPP:
        raise RuntimeError("use_backend('cpp'): the C++ extension fibecfed_kernels._C was not built")
    if name == "triton" and not HAS_TRITON:
        raise RuntimeError("use_backend('triton'): triton is not installed")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def runs_cpp(tensor: torch.Tensor) -> bool:
    """Whether an op on ``tensor`` goes straight to C++: eager, on the CPU, and nothing else forced."""
    if torch.compiler.is_compiling():  # first: what follows cannot be traced
        return False
    return HAS_CPP and tensor.is_cpu and _forced.get() in (None, "cpp")


def body_for(tensor: torch.Tensor) -> Backend:
    """:func:`backend` for a tensor, refusing a forced body that cannot read it.

    While torch.compile traces, it is the registered op's own choice: a forced body is not seen.
    """
    if torch.compiler.is_compiling():
        return "triton" if tensor.device.type == "cuda" else "cpp"
    chosen = backend(tensor.device)
    if chosen == "cpp" and tensor.device.type != "cpu":
        raise RuntimeError(f"backend 'cpp' was forced, but the tensors are on {tensor.device}")
    if chosen == "triton" and tensor.device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f"backend 'triton' was forced, but the tensors are on {tensor.device}; wanted cuda, or Triton's "
            "interpreter (TRITON_INTERPRET=1 before Triton is imported)"
        )
    return cast(Backend, chosen)


def interpreting() -> bool:
    """Triton runs its kernels in Python, on tensors of any device: slow, for tests."""
    from triton import knobs  # not at the top: importing Triton costs time that CPU users need not pay

    return bool(knobs.runtime.interpret)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current CUDA device: make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return cast(AbstractContextManager[None], torch.cuda.device(tensor.device))
