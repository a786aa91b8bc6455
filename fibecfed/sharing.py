"""LoRA pairs that read the same input (query, key and value of a block) gathered for one launch of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fibecfed_kernels import LoraFisherDiag, lora_fisher_diag, use_backend

from .lora import LoraPair


class Seen(NamedTuple):
    """What the backward of a pair saw: x and h, the inputs of A and B, and the gradients of their outputs."""

    pair: LoraPair
    x: Tensor
    h: Tensor
    grad_h: Tensor
    grad_y: Tensor


class SharedInputs:
    """Gathers pairs whose backwards follow each other on the same x, and launches a group when the next one begins.

    So a group's gradients are not there yet when its own backwards return: this is for those who need none of them.
    ``take(seen, found)`` is called for each pair, in the order of the backwards. One group is open for each device, as
    autograd has a thread for each.
    """

    def __init__(self, take: Callable[[Seen, LoraFisherDiag], None]) -> None:
        self._take = take
        self._open: dict[torch.device, tuple[Any, list[Seen], Tensor | None]] = {}

    def add(self, seen: Seen, body: Any, cu_seqlens: Tensor | None) -> None:
        """``body``: of the op, as :func:`fibecfed_kernels.use_backend` names it."""
        device = seen.x.device
        _, group, _ = self._open.get(device, (None, [], None))
        if group and not _same(group[0].x, seen.x):
            self._launch(device)
            group = []
        self._open[device] = body, [*group, seen], cu_seqlens

    def flush(self) -> None:
        """Launch what is still open."""
        for device in list(self._open):
            self._launch(device)

    def _launch(self, device: torch.device) -> None:
        body, group, cu_seqlens = self._open.pop(device)
        with use_backend(body):
            if len(group) == 1:
                (one,) = group
                found = [lora_fisher_diag(one.x, one.h, one.grad_h, one.grad_y, cu_seqlens)]
            else:
                hs, grad_hs, grad_ys = (
                    list(ts) for ts in zip(*((s.h, s.grad_h, s.grad_y) for s in group), strict=True)
                )
                found = lora_fisher_diag(group[0].x, hs, grad_hs, grad_ys, cu_seqlens)
        for seen, result in zip(group, found, strict=True):
            self._take(seen, result)


def _same(a: Tensor, b: Tensor) -> bool:
    """One memory, read the same way: both are alive, so that an address stands for its contents."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
