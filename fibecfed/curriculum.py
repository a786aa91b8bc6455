"""Which samples a device trains on in a round: order by difficulty, pacing of the share, selection, batches.

Pure functions of their arguments; whatever is random takes a numpy Generator or a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .batches import Indices, cut

Shape = Callable[[float, float, float, int], float]  # (x, β, p, steps) -> share, asked only for 0 < x < 1

SHARPNESS = 10.0  # of exponential and log: e^10 between their slowest and their fastest moment

# With x = t'/(αT); every shape runs from β at x = 0 to 1 at x = 1.
PACINGS: Mapping[str, Shape] = MappingProxyType(
    {
        "linear": lambda x, beta, p, steps: beta + (1 - beta) * x,
        "sqrt": lambda x, beta, p, steps: _root(x, beta, 2.0),
        "root_p": lambda x, beta, p, steps: _root(x, beta, p),
        "quadratic": lambda x, beta, p, steps: beta + (1 - beta) * x**2,
        "exponential": lambda x, beta, p, steps: beta + (1 - beta) * math.expm1(SHARPNESS * x) / math.expm1(SHARPNESS),
        "log": lambda x, beta, p, steps: beta + (1 - beta) * math.log1p(math.expm1(SHARPNESS) * x) / SHARPNESS,
        "step": lambda x, beta, p, steps: beta + (1 - beta) * math.floor(x * steps + 1e-9) / steps,
        "geometric": lambda x, beta, p, steps: beta ** (1 - x),
        "none": lambda x, beta, p, steps: 1.0,
    }
)

ORDERS = ("easy_first", "hard_first", "random")


def _root(x: float, beta: float, p: float) -> float:
    return float((beta**p + (1 - beta**p) * x) ** (1 / p))


def pacing(name: str, t: int, T: int, *, alpha: float, beta: float, p: float = 2.0, steps: int = 5) -> float:
    """Share c(t) of a device's ordered samples that round t uses.

    With t' = t − 1 and x = t'/(αT)::

        linear       β + (1 − β)·x                               [paper]
        root_p       (β^p + (1 − β^p)·x)^(1/p), sqrt is p = 2    [ours: Platanios et al. 2019, arXiv 1903.09848]
        quadratic    β + (1 − β)·x²                              [ours: as are all below]
        exponential  β + (1 − β)·(e^{10x} − 1)/(e^{10} − 1)      (after Wu et al. 2021, arXiv 2012.03107)
        log          β + (1 − β)·ln(1 + (e^{10} − 1)·x)/10       (inverse of exponential, so that both ends are exact)
        step         β + (1 − β)·⌊steps·x⌋/steps                 (stairs of equal height; the last is at x = 1)
        geometric    β^{1 − x}                                   (grows by the same factor every round)
        none         1, whatever α and β

    c is monotone in t and lies in [β, 1]; it is exactly β in the first round and exactly 1.0 from t' ≥ αT on. Where the
    two meet, at α = 0, all data is used from the first round on: 1.0 [ours]. With α = 1 the last round, T − 1 < αT, is
    still below 1.

    Args:
        name: one of :data:`PACINGS`.
        t: round, 1 … T.  T: number of rounds, ≥ 1.
        alpha: share of the rounds after which all data is used, in [0, 1].
        beta: share of the data at the start, in (0, 1].
        p: exponent of root_p, > 0.  steps: stairs of step, ≥ 1.

    Raises ValueError naming the argument.
    """
    _check("name", name, name in PACINGS, f"one of {', '.join(PACINGS)}")
    _check("T", T, T >= 1, "T ≥ 1")
    _check("t", t, 1 <= t <= T, f"1 ≤ t ≤ {T} (T)")
    _check("alpha", alpha, 0.0 <= alpha <= 1.0, "0 ≤ alpha ≤ 1")
    _check("beta", beta, 0.0 < beta <= 1.0, "0 < beta ≤ 1")
    _check("p", p, 0.0 < p < math.inf, "0 < p < ∞")
    _check("steps", steps, steps >= 1, "steps ≥ 1")
    passed, span = t - 1, alpha * T
    # 0.07·100 is 7.000000000000001 in floating point: round 8 is past the end all the same.
    if name == "none" or passed >= span or math.isclose(passed, span, rel_tol=1e-12):
        return 1.0
    if passed == 0:
        return float(beta)  # not through the shape: (β^p)^(1/p) does not round back to β
    return min(1.0, max(float(beta), PACINGS[name](passed / span, beta, p, steps)))


def order(scores: Tensor | ArrayLike, name: str = "easy_first", *, seed: int | None = None) -> Indices:
    """Order of a device's samples: int64 (N,) indices into ``scores`` (N,).

    easy_first: ascending difficulty [paper]; hard_first: descending [ours, the control]; random: a permutation seeded
    by ``seed`` [ours, the control]. Sorting is stable: of equal scores the lower index comes first.

    Raises ValueError for an unknown name, a NaN score, scores that are not 1-D, or random without a seed.
    """
    _check("name", name, name in ORDERS, f"one of {', '.join(ORDERS)}")
    values = _vector("scores", scores).astype(np.float64)  # minus an unsigned integer is another one
    if np.isnan(values).any():
        raise ValueError(f"scores: NaN at index {int(np.isnan(values).argmax())}, wanted numbers")
    if name == "random":
        if seed is None:
            raise ValueError("seed: None, wanted an integer for the random order")
        return np.random.default_rng(seed).permutation(len(values)).astype(np.int64)
    return np.argsort(values if name == "easy_first" else -values, kind="stable").astype(np.int64)


def stratified_order(
    scores: Tensor | ArrayLike, labels: Tensor | ArrayLike, name: str = "easy_first", *, seed: int | None = None
) -> Indices:
    """:func:`order` inside every class, the classes interleaved in proportion [ours]: int64 (N,).

    A sample's key is its relative rank (rank + ½)/N_c among the N_c samples of its class, so any first share of the
    order holds about that share of every class: the curriculum does not change a device's label mix.

    Raises ValueError as :func:`order`, and for labels (N,) of another length.
    """
    by_score, classes = order(scores, name, seed=seed), _vector("labels", labels)
    if len(classes) != len(by_score):
        raise ValueError(f"labels: {len(classes)} values, wanted {len(by_score)} as scores have")
    keys = np.empty(len(by_score))
    for label in np.unique(classes):
        members = by_score[classes[by_score] == label]
        keys[members] = (np.arange(len(members)) + 0.5) / len(members)
    return by_score[np.argsort(keys[by_score], kind="stable")]


def select(order: Tensor | ArrayLike, share: float, batch_size: int) -> Indices:
    """The first ``share``·N samples of an order, to the nearest integer: int64 (n,), in that order.

    At least one batch, or all samples when there are fewer [ours]. Raises ValueError naming the argument.
    """
    _check("share", share, 0.0 < share <= 1.0, "0 < share ≤ 1")
    _check("batch_size", batch_size, batch_size >= 1, "batch_size ≥ 1")
    indices = _vector("order", order).astype(np.int64)
    return indices[: max(round(share * len(indices)), batch_size)]


def batches(
    selection: Tensor | ArrayLike,
    batch_size: int,
    generator: np.random.Generator | None = None,
    *,
    lengths: Tensor | ArrayLike | None = None,
) -> list[Indices]:
    """Cut a selection into batches of ``batch_size`` samples, the last one shorter: a list of int64 arrays.

    With ``generator`` the samples are shuffled inside the selection first, without it they keep its order. With
    ``lengths`` (tokens of each sample, indexed as the selection is) too, samples of like length share a batch and the
    batches come in random order: less padding, at the price of batches that are not independent of length [ours].
    """
    indices = _vector("selection", selection).astype(np.int64)
    if generator is not None:
        indices = generator.permutation(indices)
        if lengths is not None:
            indices = indices[np.argsort(_vector("lengths", lengths)[indices], kind="stable")]
    found = cut(indices, batch_size)
    if generator is not None and lengths is not None:
        found = [found[i] for i in generator.permutation(len(found))]
    return found


def batch_difficulty(scores: Tensor | ArrayLike, batches: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Difficulty of each batch: the sum of its samples' scores [paper], float64 (number of batches,)."""
    values = _vector("scores", scores).astype(np.float64)
    return np.array([values[np.asarray(batch, dtype=np.int64)].sum() for batch in batches], dtype=np.float64)


def _vector(name: str, values: Tensor | ArrayLike) -> NDArray[Any]:
    array = np.asarray(values.detach().cpu().numpy() if isinstance(values, Tensor) else values)
    if array.ndim != 1:
        raise ValueError(f"{name}: shape {array.shape}, wanted 1-D")
    return array


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name}: {value}, wanted {wanted}")
