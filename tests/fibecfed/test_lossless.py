"""Lanczos against dense eigenvalues and Gauss quadrature; the lossless rule against its words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fibecfed.lossless import Decision, Spectrum, combine_decisions, decide, lanczos


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dim", [1, 2, 7, 40])
def test_full_lanczos_finds_all_eigenvalues(dim: int) -> None:
    A = torch.randn(dim, dim, dtype=torch.float64)
    A = A + A.T
    found = lanczos(A.mv, dim, dim + 5, generator())
    np.testing.assert_allclose(found.values.numpy(), np.linalg.eigvalsh(A.numpy()), rtol=1e-9, atol=1e-9)
    assert float(found.weights.sum()) == pytest.approx(1.0)
    assert found.dim == dim


def test_full_lanczos_over_ten_orders_of_magnitude() -> None:
    """Without reorthogonalisation copies of the largest eigenvalue push the small ones out."""
    wanted = torch.logspace(-4, 6, 30, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))
    found = lanczos((basis * wanted @ basis.T).mv, 30, 30, generator())
    np.testing.assert_allclose(found.values.numpy(), wanted.numpy(), rtol=1e-5, atol=1e-7)


def test_few_steps_are_a_gauss_quadrature_of_the_spectrum() -> None:
    A = torch.randn(50, 50, dtype=torch.float64)
    A = (A + A.T) / 10
    found = lanczos(A.mv, 50, 6, generator(5))
    start = torch.randn(50, generator=generator(5), dtype=torch.float64)
    start, power = start / start.norm(), start / start.norm()
    assert len(found.values) == len(found.weights) == 6
    assert bool((found.weights >= 0).all())
    for degree in range(12):  # k nodes are exact up to degree 2k − 1
        moment = float((found.weights * found.values**degree).sum())
        assert moment == pytest.approx(float(start @ power), rel=1e-9, abs=1e-9)
        power = A @ power
    exact = np.linalg.eigvalsh(A.numpy())
    assert exact[0] <= float(found.values[0]) < float(found.values[-1]) <= exact[-1]


def test_lanczos_stops_where_the_space_ends() -> None:
    one = lanczos(lambda v: 3 * v, 20, 10, generator())
    assert one.values.tolist() == pytest.approx([3.0])
    assert one.weights.tolist() == pytest.approx([1.0])
    zero = lanczos(torch.zeros_like, 20, 10, generator())
    assert zero.values.tolist() == [0.0]
    two = lanczos(torch.tensor([1.0] * 200 + [5.0] * 100, dtype=torch.float64).mul, 300, 10, generator())
    assert two.values.tolist() == pytest.approx([1.0, 5.0])
    assert two.weights.tolist() == pytest.approx([2 / 3, 1 / 3], abs=0.1)  # shares of the eigenvalues, in expectation


def test_lanczos_is_made_by_its_seed() -> None:
    A = torch.diag(torch.arange(30.0))
    a, b, c = (lanczos(lambda v: A @ v.float(), 30, 4, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.weights, b.weights)
    assert not torch.equal(a.values, c.values)


def test_lanczos_refuses_products_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="matvec: not finite in step 1"):
        lanczos(lambda v: v * math.nan, 4, 2, generator())
    for dim, steps in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="dim, steps"):
            lanczos(torch.clone, dim, steps, generator())


def spectrum(values: list[float], weights: list[float] | None = None, dim: int | None = None) -> Spectrum:
    """Without weights: all eigenvalues, with weights that say nothing."""
    share = [1.0] + [0.0] * (len(values) - 1) if weights is None else weights
    return Spectrum(torch.tensor(values).double(), torch.tensor(share).double(), len(values) if dim is None else dim)


@pytest.mark.parametrize(
    ("values", "L", "m"),
    [
        ([0.0, 1.0, 2.0, 7.0], 1.0, 3),
        ([0.0, 5.0, 10.0, 30.0], 1.0, 1),  # the first gap, not the widest
        ([0.0, 4.0, 8.0, 12.5], 1.0, 3),  # a gap of exactly 4 L is none
        ([-9.0, -1.0, 0.0], 1.9, 1),
        ([0.0, 1.0, 1.0, 1.5], 0.0, 1),
        ([0.0, 0.0, 0.0, 0.5], 0.0, 3),
    ],
)
def test_first_gap_wider_than_four_lipschitz(values: list[float], L: float, m: int) -> None:
    found = decide(spectrum(values), L)
    assert (found.found, found.m, found.share) == (True, m, 1 - m / len(values))


@pytest.mark.parametrize(("values", "L"), [([0.0, 4.0, 8.0], 1.0), ([2.0, 2.0], 0.0), ([5.0], 0.0)])
def test_no_gap_is_said(values: list[float], L: float) -> None:
    found = decide(spectrum(values), L)
    assert (found.found, found.m, found.share, found.dim) == (False, 0, None, len(values))


@pytest.mark.parametrize(
    ("weights", "m"),
    [([0.25, 0.5, 0.25], 75), ([0.0, 0.004, 0.996], 2), ([0.5, 0.5, 0.0], 99), ([0.1, 0.2 + 1e-9, 0.7], 30)],
)
def test_weights_say_how_many_eigenvalues_lie_below_the_gap(weights: list[float], m: int) -> None:
    found = decide(spectrum([0.0, 1.0, 9.0], weights, dim=100), 1.0)
    assert (found.m, found.dim, found.share) == (m, 100, 1 - m / 100)


@given(
    values=st.lists(st.integers(-20, 20), min_size=1, max_size=12).map(sorted),
    L=st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_with_all_eigenvalues_it_is_the_rule_itself(values: list[int], L: float, seed: int) -> None:
    weights = torch.rand(len(values), generator=generator(seed)).double()
    gaps = [m for m in range(1, len(values)) if values[m] - values[m - 1] > 4 * L]
    found = decide(spectrum([float(v) for v in values], (weights / weights.sum()).tolist()), L)
    assert (found.found, found.m) == (bool(gaps), gaps[0] if gaps else 0)


def test_decide_refuses_what_is_no_spectrum() -> None:
    for wrong in (spectrum([1.0, 0.0]), spectrum([0.0, math.nan]), spectrum([], []), spectrum([0.0, 1.0], dim=1)):
        with pytest.raises(ValueError, match="spectrum"):
            decide(wrong, 0.0)
    for L in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lipschitz"):
            decide(spectrum([0.0, 1.0]), L)


def decision(share: float | None) -> Decision:
    return Decision(share is not None, 0, 10, share, [], [], 0.0)


@pytest.mark.parametrize(
    ("shares", "sizes", "default", "count"),
    [
        ([0.5, 0.75], [30, 10], 0.9, 7),  # 12 · 0.5625 = 6.75
        ([0.5, 0.75], [10, 30], 0.9, 8),  # 12 · 0.6875 = 8.25
        ([None, 0.75], [30, 10], 0.25, 4),  # 12 · 0.375 = 4.5, to even
        ([None], [3], 0.5, 6),
        ([0.001], [5], 0.5, 1),
        ([0.999], [5], 0.5, 12),
        ([None, None], [5, 5], 0.0, 1),
    ],
)
def test_number_of_layers(shares: list[float | None], sizes: list[int], default: float, count: int) -> None:
    assert combine_decisions([decision(share) for share in shares], sizes, 12, default) == count


def test_number_of_layers_refuses_what_does_not_fit() -> None:
    one = [decision(0.5)]
    for sizes in ([], [1, 1], [0], [math.nan]):
        with pytest.raises(ValueError, match="sizes"):
            combine_decisions(one, sizes, 4, 0.5)
    with pytest.raises(ValueError, match="sizes"):
        combine_decisions([], [], 4, 0.5)
    with pytest.raises(ValueError, match="num_layers"):
        combine_decisions(one, [1], 0, 0.5)
    with pytest.raises(ValueError, match="default_share"):
        combine_decisions(one, [1], 4, 1.5)
