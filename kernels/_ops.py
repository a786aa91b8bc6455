"""Every torch.library schema and fake of fibecfed_kernels, in one file.

A body is chosen by device: C++ registers itself for the CPU when ``_C`` is loaded, Triton for CUDA on first use. Where
the extension is missing the reference serves the CPU. Mutating ops return ``()``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._backend import HAS_CPP, HAS_TRITON
from ._dispatch import module_of

SCHEMAS = {
    "fisher_diag": "(Tensor x, Tensor grad_y, Tensor? cu_seqlens, bool weight_grad) -> (Tensor, Tensor, Tensor)",
    "lora_fisher_diag": "(Tensor x, Tensor[] h, Tensor[] grad_h, Tensor[] grad_y, Tensor? cu_seqlens, bool weight_grad)"
    " -> (Tensor, Tensor, Tensor)",
    "weighted_grad": "(Tensor x, Tensor grad_y, Tensor weights, Tensor? cu_seqlens) -> Tensor",
    "masked_adamw_": "(Tensor(a!) data, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) steps,"
    " Tensor mask, Tensor layout, float lr, float beta1, float beta2, float eps, float weight_decay,"
    " Tensor? grad_scale=None, Tensor? lr_scale=None) -> ()",
    "masked_sgd_": "(Tensor(a!) data, Tensor grad, Tensor(b!) momentum_buffer, Tensor(c!) steps, Tensor mask,"
    " Tensor layout, float lr, float momentum, float dampening, float weight_decay, bool nesterov,"
    " Tensor? grad_scale=None, Tensor? lr_scale=None) -> ()",
    "masked_grad_norm": "(Tensor grad, Tensor mask, Tensor layout) -> Tensor",
    "wire_pack_": "(Tensor data, Tensor table, Tensor(a!) values, Tensor(b!) scales) -> ()",
    "wire_unpack_": "(Tensor values, Tensor scales, Tensor table, Tensor(a!) data) -> ()",
    "wire_accumulate_": "(Tensor(a!) sum, Tensor[] values, Tensor[] scales, Tensor table, float[] weights) -> ()",
    "wire_mean_": "(Tensor(a!) mean, Tensor sum, Tensor[] values, Tensor[] scales, Tensor table, float[] weights,"
    " float total) -> ()",
    "wire_digest": "(Tensor buffer, Tensor ranges) -> Tensor",
}
# Whole messages in one call, which other bodies make of the ops above (wire/frame.py). They answer in integers, which
# spare the cold caches a tensor, and have no fakes: nothing that is traced calls them.
FUSED = {
    "wire_write_": "(Tensor data, Tensor table, Tensor ranges, Tensor header, Tensor places, int round,"
    " int num_samples, int base, Tensor(a!) message) -> int",
    "wire_read_": "(Tensor message, Tensor table, Tensor ranges, Tensor header, Tensor places, int round, int base,"
    " float weight, Tensor(a!) target) -> (int, int, int)",
}
CPU_ONLY = {"wire_digest", "wire_mean_"}  # they read messages, which are in the host's memory

_library = torch.library.Library("fibecfed", "DEF")
for _name, _schema in {**SCHEMAS, **FUSED}.items():
    _library.define(_name + _schema)


def _register_python_body(name: str, body: str, key: str) -> None:
    """Register ``fibecfed_kernels.<family>.<body>.<name>`` for a dispatch key, imported at the first call."""

    def call(*args: Any) -> Any:
        return getattr(module_of(name, body), name)(*args)

    _library.impl(name, call, key)


for _name in SCHEMAS:
    if not HAS_CPP:
        _register_python_body(_name, "reference", "CPU")
    if _name not in CPU_ONLY:
        _register_python_body(_name, "triton" if HAS_TRITON else "reference", "CUDA")


@torch.library.register_fake("fibecfed::fisher_diag", lib=_library)
def _(x: Tensor, grad_y: Tensor, cu_seqlens: Tensor | None, weight_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    samples = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (grad_y.shape[-1], x.shape[-1])
    return (
        x.new_empty(samples, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape if weight_grad else (0,), dtype=torch.float32),
    )


@torch.library.register_fake("fibecfed::lora_fisher_diag", lib=_library)
def _(
    x: Tensor, h: list[Tensor], grad_h: list[Tensor], grad_y: list[Tensor], cu_seqlens: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    samples = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    numel = sum(h_m.shape[-1] * (x.shape[-1] + y_m.shape[-1]) for h_m, y_m in zip(h, grad_y, strict=True))
    return (
        x.new_empty((2 * len(h), samples), dtype=torch.float32),
        x.new_empty(numel, dtype=torch.float32),
        x.new_empty(numel if weight_grad else 0, dtype=torch.float32),
    )


@torch.library.register_fake("fibecfed::weighted_grad", lib=_library)
def _(x: Tensor, grad_y: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_empty((grad_y.shape[-1], x.shape[-1]), dtype=torch.float32)


@torch.library.register_fake("fibecfed::masked_adamw_", lib=_library)
def _(*args: Any, **scales: Any) -> None:
    return None


@torch.library.register_fake("fibecfed::masked_sgd_", lib=_library)
def _(*args: Any, **scales: Any) -> None:
    return None


@torch.library.register_fake("fibecfed::masked_grad_norm", lib=_library)
def _(grad: Tensor, mask: Tensor, layout: Tensor) -> Tensor:
    return grad.new_empty((), dtype=torch.float32)


@torch.library.register_fake("fibecfed::wire_pack_", lib=_library)
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("fibecfed::wire_unpack_", lib=_library)
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("fibecfed::wire_accumulate_", lib=_library)
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("fibecfed::wire_mean_", lib=_library)
def _(*args: Any) -> None:
    return None


@torch.library.register_fake("fibecfed::wire_digest", lib=_library)
def _(buffer: Tensor, ranges: Tensor) -> Tensor:
    return ranges.new_empty((ranges.shape[0], 2))
