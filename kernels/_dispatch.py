"""From an op's name to the body that runs it; the same way for every family."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._backend import body_for

# the folder of an op's bodies, by the first word of its name
FAMILIES = {"fisher": "fisher", "lora": "fisher", "weighted": "fisher", "masked": "update", "wire": "wire"}


def run(name: str, device_of: Tensor, *args: Any) -> Any:
    """Run the op ``name`` where ``device_of`` is, by the body chosen there (:func:`fibecfed_kernels.backend`).

    Triton is called past the Python op boundary, which costs ~60 µs a call on the host, but not while tracing.
    """
    body = body_for(device_of)
    if body == "reference" or (body == "triton" and not torch.compiler.is_compiling()):
        return getattr(module_of(name, body), name)(*args)
    return getattr(torch.ops.fibecfed, name).default(*args)  # spares the search for an overload


def module_of(name: str, body: str) -> ModuleType:
    """The module that holds an op's body in Python; Triton is imported at the first use, which CPU users never pay."""
    return importlib.import_module(f".{FAMILIES[name.partition('_')[0]]}.{body}", __package__)
