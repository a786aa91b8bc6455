"""Masked AdamW and SGD in plain torch: torch.optim's own sequence of operations, on the active rows only."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def _active(steps: Tensor, mask: Tensor, layout: Tensor) -> Iterator[tuple[int, Tensor | None]]:
    """Count up the active rows' steps; yield (step, indices of the values of rows at that step), None for all
    values."""
    lengths = layout[:, 3].repeat_interleave(layout[:, 2]).to(mask.device)
    steps += mask
    for step in steps[mask].unique().tolist():
        rows = mask & (steps == step)
        yield step, None if bool(rows.all()) else rows.repeat_interleave(lengths).nonzero().squeeze(1)


def masked_adamw_(
    data: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, steps: Tensor, mask: Tensor, layout: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """In place on data, exp_avg, exp_avg_sq, steps; the operations and their order are torch.optim.AdamW's."""
    for step, index in _active(steps, mask, layout):
        buffers = (data, grad, exp_avg, exp_avg_sq)
        p, g, m, v = buffers if index is None else tuple(t[index] for t in buffers)
        p.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denom = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        p.addcdiv_(m, denom, value=-(lr / (1 - beta1**step)))
        if index is not None:
            data[index], exp_avg[index], exp_avg_sq[index] = p, m, v


def masked_sgd_(
    data: Tensor, grad: Tensor, momentum_buffer: Tensor, steps: Tensor, mask: Tensor, layout: Tensor,
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    """In place on data, momentum_buffer, steps; torch.optim.SGD's operations (decay is added to the gradient)."""
    for step, index in _active(steps, mask, layout):
        p, g = (data, grad) if index is None else (data[index], grad[index])
        if weight_decay != 0:
            g = g.add(p, alpha=weight_decay)
        if momentum != 0:
            b = momentum_buffer if index is None else momentum_buffer[index]
            if step == 1:
                b.copy_(g)  # the first step of a row is not dampened
            else:
                b.mul_(momentum).add_(g, alpha=1 - dampening)
            if index is not None:
                momentum_buffer[index] = b
            g = g.add(b, alpha=momentum) if nesterov else b
        p.add_(g, alpha=-lr)
        if index is not None:
            data[index] = p
