"""How many layers must travel: the "lossless" rule on the spectrum of a device's Hessian over its LoRA parameters.

``flat``, ``loss`` and ``method`` are as in :mod:`fibecfed.hessian`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .hessian import Flat, Loss, Method, gradient, hvp, scale, span_of
from .tree import evaluating


@dataclass(frozen=True)
class Spectrum:
    """``values`` (k,) float64, ascending Ritz values; ``weights`` (k,) float64, their share of the dim eigenvalues."""

    values: Tensor
    weights: Tensor
    dim: int


@dataclass(frozen=True)
class Decision:
    """What the rule says for one device.

    found: whether a gap was found.  m: directions that can be left out, of dim (0 when no gap was found).
    share: 1 − m/dim, the share kept; None when no gap was found.
    eigenvalues, weights: the Ritz values and their weights.  lipschitz: L_k.
    """

    found: bool
    m: int
    dim: int
    share: float | None
    eigenvalues: list[float]
    weights: list[float]
    lipschitz: float

    def to_record(self) -> dict[str, Any]:
        """The fields as numbers, lists of numbers and None: what JSON takes."""
        return asdict(self)


def device_decision(
    flat: Flat,
    loss: Loss,
    *,
    generator: torch.Generator,
    steps: int = 10,
    samples: int = 3,
    radius: float = 1e-2,
    method: Method = "differences",
    span: slice | None = None,
) -> Decision:
    """The rule for one device: spectrum by ``steps`` of :func:`lanczos`, L_k by :func:`lipschitz`, :func:`decide`.

    ``flat.model`` is in eval mode meanwhile. Costs about 2·steps + 3·samples + 4 backward passes with differences.
    ``flat.data`` and ``flat.grad`` come back bit by bit. The same generator state gives the same decision.
    ``span``: the values of the flat buffer it is about (one layer's, say); None: all LoRA values.
    Raises ValueError when ``loss`` has two values for the same parameters.
    """
    with evaluating(flat.model):
        with torch.no_grad():
            first, second = float(loss()), float(loss())
        if not math.isclose(first, second, rel_tol=1e-5, abs_tol=1e-7):
            raise ValueError(f"loss: {first}, then {second} for the same parameters, wanted one value: no dropout")
        values = span_of(flat, span)
        dim = values.stop - values.start
        spectrum = lanczos(lambda v: hvp(flat, loss, v, method=method, span=span), dim, steps, generator)
        bound = lipschitz(flat, loss, generator, samples=samples, radius=radius, method=method, span=span)
    return decide(spectrum, bound)


def lanczos(matvec: Callable[[Tensor], Tensor], dim: int, steps: int, generator: torch.Generator) -> Spectrum:
    """Stochastic Lanczos quadrature of a symmetric operator A from one random unit vector [ours].

    k = min(steps, dim) steps with full reorthogonalisation, done twice, in float64. The Ritz values θ_i are the
    eigenvalues of the tridiagonal T_k, the weight w_i is the squared first component of its i-th eigenvector: (θ, w) is
    the Gauss quadrature (Golub and Welsch 1969) of the start vector's spectral measure, in which every eigenvalue of A
    has the weight 1/dim in expectation. Fewer values come back when the vectors seen span an invariant subspace.

    Args:
        matvec: v ↦ A v, float64 (dim,) in, (dim,) of any dtype and device out.
        generator: of the start vector; a CPU generator gives the same vector on every device.

    Raises ValueError for dim or steps below 1, or a result of ``matvec`` that is not finite.
    """
    if dim < 1 or steps < 1:
        raise ValueError(f"dim, steps: {dim}, {steps}, wanted both ≥ 1")
    start = torch.randn(dim, generator=generator, dtype=torch.float64, device=generator.device)
    basis = (start / start.norm()).cpu()[None]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(steps, dim)):
        w = matvec(basis[-1]).detach().to(basis)
        diagonal.append(float(basis[-1] @ w))
        for _ in range(2):  # once leaves a rest of the size of the cancellation
            w = w - basis.T @ (basis @ w)
        beside.append(float(w.norm()))
        if not math.isfinite(diagonal[-1]) or not math.isfinite(beside[-1]):
            raise ValueError(f"matvec: not finite in step {len(diagonal)}, wanted a finite product")
        if beside[-1] <= 1e-12 * max(map(abs, diagonal + beside[:-1])):
            break
        basis = torch.cat([basis, (w / beside[-1])[None]])
    off = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(
        torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    )
    return Spectrum(values, vectors[0].square(), dim)


def lipschitz(
    flat: Flat,
    loss: Loss,
    generator: torch.Generator,
    *,
    samples: int = 3,
    radius: float = 1e-2,
    method: Method = "differences",
    span: slice | None = None,
) -> float:
    """L_k, an estimate from below of the Lipschitz constant of Φ: Δ ↦ HΔ − ∇L(P + Δ) around 0 [the estimate is ours]::

        L_k = max_i ‖Φ(Δ_i) − Φ(0)‖ / ‖Δ_i‖ = max_i ‖HΔ_i − ∇L(P + Δ_i) + ∇L(P)‖ / ‖Δ_i‖

    over −∇L(P) and ``samples`` random directions, each of length ``radius``·max(1, ‖P‖). It is 0 for a quadratic loss,
    and about proportional to ``radius``, which says how far from P the quadratic model is asked to hold.

    ``flat.data`` and ``flat.grad`` come back bit by bit. Raises ValueError for samples < 1 or radius ≤ 0.
    """
    if samples < 1 or not 0.0 < radius < math.inf:
        raise ValueError(f"samples, radius: {samples}, {radius}, wanted samples ≥ 1 and 0 < radius < ∞")
    values = span_of(flat, span)
    length, dim = radius * scale(flat, values), values.stop - values.start
    here = gradient(flat, loss, values)
    directions = [-here.double()] if bool(here.any()) else []
    for _ in range(samples):
        drawn = torch.randn(dim, generator=generator, dtype=torch.float64, device=generator.device)
        directions.append(drawn.to(here.device))
    ratios = []
    for direction in directions:
        shift = (direction * (length / direction.norm())).to(here)
        change = gradient(flat, loss, values, shift).double() - here.double()
        rest = hvp(flat, loss, shift, method=method, span=span).double() - change
        ratios.append(float(rest.norm() / shift.double().norm()))
    return max(ratios)


def decide(spectrum: Spectrum, lipschitz: float) -> Decision:
    """The first m with λ_{m+1} − λ_m > 4·L_k: m of the dim directions can be left out [paper; on Ritz values: ours].

    The dim eigenvalues λ_1 ≤ … ≤ λ_dim are represented by the k Ritz values θ_1 ≤ … ≤ θ_k, θ_i standing for as many of
    them as its weight says. So the λ differ only from one θ to the next, where ::

        m_i = round(dim·(w_1 + … + w_i)), kept in [i, dim − k + i]

    (every θ stands for at least one eigenvalue): m is the first m_i with θ_{i+1} − θ_i > 4·L_k. With k = dim this is
    the rule itself, whatever the weights. With k < dim eigenvalues may lie between two Ritz values, so that few steps
    find gaps too easily rather than too rarely. At B = 0 the spectrum is nearly symmetric about 0 and sparse at both
    ends: a gap found there, at its lower end, leaves out next to nothing.

    Raises ValueError when the values are not ascending and finite, do not match the weights, or lipschitz is not ≥ 0.
    """
    values, weights, dim = spectrum.values.tolist(), spectrum.weights.tolist(), spectrum.dim
    if not 0 < len(values) <= dim or len(weights) != len(values):
        raise ValueError(f"spectrum: {len(values)} values, {len(weights)} weights, wanted as many of each, 1 … {dim}")
    if values != sorted(values) or not all(map(math.isfinite, values + weights)):
        raise ValueError(f"spectrum: values {values}, weights {weights}, wanted finite numbers, the values ascending")
    if not 0.0 <= lipschitz < math.inf:
        raise ValueError(f"lipschitz: {lipschitz}, wanted 0 ≤ lipschitz < ∞")
    below = 0.0
    for i in range(1, len(values)):
        below += weights[i - 1]
        if values[i] - values[i - 1] > 4 * lipschitz:
            m = min(max(round(dim * below), i), dim - len(values) + i)
            return Decision(True, m, dim, 1 - m / dim, values, weights, lipschitz)
    return Decision(False, 0, dim, None, values, weights, lipschitz)


def combine_decisions(
    decisions: Sequence[Decision], sizes: Sequence[int], num_layers: int, default_share: float
) -> int:
    """N = clamp(round(layers · Σ_k (n_k/n)(1 − m_k/d_k)), 1, layers) [paper].

    A device without a gap (``found`` is False, which is its record) counts with ``default_share`` in [0, 1] [ours].
    ``sizes`` are n_k > 0 of the devices asked, n their sum. Raises ValueError naming the argument.
    """
    if not decisions or len(sizes) != len(decisions) or not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"sizes: {list(sizes)} for {len(decisions)} decisions, wanted one number > 0 for each of ≥ 1")
    if num_layers < 1:
        raise ValueError(f"num_layers: {num_layers}, wanted ≥ 1")
    if not 0.0 <= default_share <= 1.0:
        raise ValueError(f"default_share: {default_share}, wanted 0 ≤ default_share ≤ 1")
    shares = [default_share if decision.share is None else decision.share for decision in decisions]
    kept = sum(size * share for size, share in zip(sizes, shares, strict=True)) / sum(sizes)
    return min(max(round(num_layers * kept), 1), num_layers)
