"""Which hyper-parameters a step takes; the same for the ops and for the optimizers that call them."""

from __future__ import annotations

import math


def checked_adamw(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> tuple[float, float, float, float, float]:
    """lr, both betas, eps and weight decay as floats. Raise ValueError (TypeError for what is no number) naming the
    argument, unless AdamW can step with these."""
    _not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas: {betas!r}, wanted two numbers in [0, 1)")
    for i, beta in enumerate(betas):
        if not 0.0 <= _number(f"betas[{i}]", beta) < 1.0:
            raise ValueError(f"betas[{i}]: {beta}, wanted 0 ≤ betas[{i}] < 1")
    return float(lr), float(betas[0]), float(betas[1]), float(eps), float(weight_decay)


def checked_sgd(
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool
) -> tuple[float, float, float, float, bool]:
    """The same, with float and bool types. Raise ValueError (TypeError for what is no number) naming the argument,
    unless SGD can step with these."""
    _not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
    if not math.isfinite(_number("dampening", dampening)):
        raise ValueError(f"dampening: {dampening}, wanted a finite number")
    if nesterov and not (momentum > 0.0 and dampening == 0.0):
        raise ValueError(f"nesterov: {nesterov}, wanted momentum > 0 and dampening 0 with it")
    return float(lr), float(momentum), float(dampening), float(weight_decay), bool(nesterov)


def check_positive(**values: float) -> None:
    """Raise ValueError (TypeError for what is no number) naming the argument that is not > 0; infinity is."""
    for name, value in values.items():
        if not _number(name, value) > 0.0:
            raise ValueError(f"{name}: {value}, wanted {name} > 0")


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not _number(name, value) >= 0.0:
            raise ValueError(f"{name}: {value}, wanted {name} ≥ 0")


def _number(name: str, value: float) -> float:
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: too large, wanted what float64 can hold") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name}: {value!r}, wanted a number") from None
