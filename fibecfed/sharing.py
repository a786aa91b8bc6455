"""LoRA pairs that read the same input (query, key and value of a block) gathered for one launch of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fibecfed_kernels import FisherDiag, fisher_diag, lora_fisher_diag, use_backend

from .lora import LoraPair


class Seen(NamedTuple):
    """What the backward of a pair saw: x and h, the inputs of A and B, and the gradients of their outputs."""

    pair: LoraPair
    x: Tensor
    h: Tensor
    grad_h: Tensor
    grad_y: Tensor


class Found(NamedTuple):
    """What the kernel found of a pair's A and B; None for one that is frozen."""

    a: FisherDiag | None
    b: FisherDiag | None


def fisher_of(seen: Seen, cu_seqlens: Tensor | None, weight_grad: bool = False) -> Found:
    """Of what is trained of a pair, in a launch of its own."""
    pair, x, h, grad_h, grad_y = seen
    if len(pair.trained) == 2:
        return Found(*lora_fisher_diag(x, h, grad_h, grad_y, cu_seqlens, weight_grad=weight_grad))
    if pair.a.weight.requires_grad:
        return Found(fisher_diag(x, grad_h, cu_seqlens, weight_grad=weight_grad), None)
    return Found(None, fisher_diag(h, grad_y, cu_seqlens, weight_grad=weight_grad))


class SharedInputs:
    """Gathers pairs whose backwards follow each other on the same x, and launches a group when the next one begins.

    So a group's gradients are not there yet when its own backwards return: this is for those who need none of them.
    ``take(seen, found)`` is called for each pair, in the order of the backwards. One group is open for each device, as
    autograd has a thread for each.
    """

    def __init__(self, take: Callable[[Seen, Found], None]) -> None:
        self._take = take
        self._open: dict[torch.device, tuple[Any, list[Seen], Tensor | None]] = {}

    def add(self, seen: Seen, body: Any, cu_seqlens: Tensor | None) -> None:
        """``body``: of the op, as :func:`fibecfed_kernels.use_backend` names it."""
        if len(seen.pair.trained) < 2:
            with use_backend(body):
                return self._take(seen, fisher_of(seen, cu_seqlens))
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
                found = [fisher_of(group[0], cu_seqlens)]
            else:
                hs, grad_hs, grad_ys = (
                    list(ts) for ts in zip(*((s.h, s.grad_h, s.grad_y) for s in group), strict=True)
                )
                found = [Found(*of) for of in lora_fisher_diag(group[0].x, hs, grad_hs, grad_ys, cu_seqlens)]
        for seen, result in zip(group, found, strict=True):
            self._take(seen, result)


def _same(a: Tensor, b: Tensor) -> bool:
    """One memory, read the same way: both are alive, so that an address stands for its contents."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
