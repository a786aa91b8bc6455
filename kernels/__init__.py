"""fibecfed_kernels: fused ops for federated LoRA fine-tuning, on torch alone (Triton on CUDA, C++ on the CPU).

* fisher: :func:`fisher_diag`, :func:`lora_fisher_diag`, :func:`clipped_grad`: per-sample Fisher information, and sums
  of clipped gradients, without per-sample gradients in memory.
* update: :func:`masked_adamw_`, :func:`masked_sgd_`: optimizer steps that really freeze rows;
  :func:`masked_grad_norm`: what they clip by.
* wire: :class:`WirePlan`, :func:`aggregate`: adapters as safetensors messages, averaged as they arrive.

Every op has three bodies of one meaning; :func:`backend` tells which one runs, :func:`use_backend` forces one.
"""

# In the repository root this folder can also be found as `kernels`, a name that transformers probes for (it belongs to
# another package). Found there it must stay empty and without a version, or transformers would take it for that
# package.
if __name__ != "kernels":
    from ._backend import backend, use_backend
    from .fisher import FisherDiag, LoraFisherDiag, clipped_grad, fisher_diag, lora_fisher_diag
    from .layout import Entry, FlatBuffers, row_layout
    from .update import masked_adamw_, masked_grad_norm, masked_sgd_
    from .wire import Message, WireError, WirePlan, aggregate

__all__ = [
    "Entry",
    "FisherDiag",
    "FlatBuffers",
    "LoraFisherDiag",
    "Message",
    "WireError",
    "WirePlan",
    "aggregate",
    "backend",
    "clipped_grad",
    "fisher_diag",
    "lora_fisher_diag",
    "masked_adamw_",
    "masked_grad_norm",
    "masked_sgd_",
    "row_layout",
    "use_backend",
]
