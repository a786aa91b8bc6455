"""Masked AdamW and SGD in plain torch: torch.optim's own sequence of operations, on the active rows only."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def _values(rows: Tensor, layout: Tensor) -> Tensor | slice:
    """What picks the values of ``rows`` out of a buffer: their indices, or a slice where that is all of it."""
    lengths = layout[:, 3].repeat_interleave(layout[:, 2]).to(rows.device)
    return slice(None) if bool(rows.all()) else rows.repeat_interleave(lengths).nonzero().squeeze(1)


def _active(
    steps: Tensor, mask: Tensor, layout: Tensor, lr: float, lr_scale: Tensor | None
) -> Iterator[tuple[int, float, Tensor | slice]]:
    """Count up the active rows' steps; yield (step, learning rate, values of the rows that share both)."""
    steps += mask
    rates = lr * (lr_scale if lr_scale is not None else layout.new_ones(len(layout), dtype=torch.float64))
    rates = rates.repeat_interleave(layout[:, 2]).to(mask.device)
    for step in steps[mask].unique().tolist():
        for rate in rates[mask & (steps == step)].unique().tolist():
            yield step, rate, _values(mask & (steps == step) & (rates == rate), layout)


def masked_adamw_(
    data: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor, mask: Tensor, layout: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    grad_scale: Tensor | None = None, lr_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """In place on data, exp_avg, exp_avg_sq, steps; the operations and their order are torch.optim.AdamW's."""
    for step, rate, at in _active(steps, mask, layout, lr, lr_scale):
        p, g, m, v = (t[at] for t in (data, grad, exp_avg, exp_avg_sq))
        g = g if grad_scale is None else g * grad_scale
        p.mul_(1 - rate * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denom = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        p.addcdiv_(m, denom, value=-(rate / (1 - beta1**step)))
        if isinstance(at, Tensor):  # a slice gave views: they are changed already
            data[at], exp_avg[at], exp_avg_sq[at] = p, m, v


def masked_sgd_(
    data: Tensor, grad: Tensor, momentum_buffer: Tensor, steps: Tensor, mask: Tensor, layout: Tensor,
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool,
    grad_scale: Tensor | None = None, lr_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """In place on data, momentum_buffer, steps; torch.optim.SGD's operations (decay is added to the gradient)."""
    for step, rate, at in _active(steps, mask, layout, lr, lr_scale):
        p, g = data[at], grad[at]
        g = g if grad_scale is None else g * grad_scale
        if weight_decay != 0:
            g = g.add(p, alpha=weight_decay)
        if momentum != 0:
            b = momentum_buffer[at]
            if step == 1:
                b.copy_(g)  # the first step of a row is not dampened
            else:
                b.mul_(momentum).add_(g, alpha=1 - dampening)
            if isinstance(at, Tensor):
                momentum_buffer[at] = b
            g = g.add(b, alpha=momentum) if nesterov else b
        p.add_(g, alpha=-rate)
        if isinstance(at, Tensor):
            data[at] = p


def masked_grad_norm(grad: Tensor, mask: Tensor, layout: Tensor) -> Tensor:
    """The norm of the active rows; 1024 squares at a time are added by one thread, and their sums without rounding."""
    squares = grad[_values(mask, layout)].double().square()
    sums = torch.nn.functional.pad(squares, (0, -squares.numel() % 1024)).view(-1, 1024).sum(1)
    return torch.tensor(math.fsum(sums.tolist()), dtype=torch.float64).sqrt().float().to(grad.device)
