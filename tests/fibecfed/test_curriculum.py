"""Pacing, order, selection and batches: properties over all pacings, worked values, and the mistakes of others."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fibecfed.curriculum import (
    ORDERS,
    PACINGS,
    batch_difficulty,
    batches,
    order,
    pacing,
    select,
    stratified_order,
)

CURVED = sorted(set(PACINGS) - {"none"})


def curve(name: str, T: int, **options: Any) -> list[float]:
    return [pacing(name, t, T, **options) for t in range(1, T + 1)]


@example(name="root_p", T=100, alpha=0.07, beta=0.1, p=3.0, steps=5)
@example(name="root_p", T=7, alpha=1.0, beta=0.01, p=500.0, steps=1)
@example(name="step", T=1, alpha=1.0, beta=0.3, p=2.0, steps=3)
@example(name="linear", T=1, alpha=0.0, beta=0.3, p=2.0, steps=3)
@given(
    name=st.sampled_from(sorted(PACINGS)),
    T=st.integers(1, 150),
    alpha=st.floats(0.0, 1.0),
    beta=st.floats(1e-6, 1.0),
    p=st.floats(0.1, 20.0),
    steps=st.integers(1, 40),
)
def test_pacing_is_monotone_clamped_and_exact_at_both_ends(
    name: str, T: int, alpha: float, beta: float, p: float, steps: int
) -> None:
    shares = curve(name, T, alpha=alpha, beta=beta, p=p, steps=steps)
    assert all(a <= b for a, b in pairwise(shares))
    assert all(beta <= share <= 1.0 for share in shares)
    assert all(share == 1.0 for passed, share in enumerate(shares) if passed >= alpha * T)
    assert shares[0] == (1.0 if name == "none" or alpha == 0.0 else beta)


@pytest.mark.parametrize("name", sorted(PACINGS))
@pytest.mark.parametrize(("alpha", "T", "first_full"), [(0.07, 100, 8), (0.55, 100, 56), (0.14, 50, 8), (0.25, 8, 3)])
def test_all_data_from_the_round_after_alpha_T_and_not_before(name: str, alpha: float, T: int, first_full: int) -> None:
    shares = curve(name, T, alpha=alpha, beta=0.2)
    assert shares[first_full - 1] == 1.0
    assert name == "none" or shares[first_full - 2] < 1.0


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("linear", {}, 0.2 + 0.8 * 0.25),
        ("sqrt", {}, math.sqrt(0.04 + 0.96 * 0.25)),
        ("root_p", {"p": 3.0}, (0.008 + 0.992 * 0.25) ** (1 / 3)),
        ("root_p", {"p": 1.0}, 0.2 + 0.8 * 0.25),
        ("quadratic", {}, 0.2 + 0.8 / 16),
        ("exponential", {}, 0.2 + 0.8 * (math.exp(2.5) - 1) / (math.exp(10) - 1)),
        ("log", {}, 0.2 + 0.8 * math.log(1 + (math.exp(10) - 1) / 4) / 10),
        ("step", {"steps": 5}, 0.2 + 0.8 / 5),
        ("step", {"steps": 4}, 0.2 + 0.8 / 4),
        ("step", {"steps": 3}, 0.2),
        ("geometric", {}, 0.2**0.75),
        ("none", {}, 1.0),
    ],
)
def test_a_quarter_of_the_way(name: str, options: dict[str, Any], wanted: float) -> None:
    assert pacing(name, 6, 40, alpha=0.5, beta=0.2, **options) == pytest.approx(wanted, rel=1e-12)


def test_root_p_has_the_exponent_one_over_p() -> None:
    two, three = (curve("root_p", 50, alpha=0.8, beta=0.1, p=p) for p in (2.0, 3.0))
    assert two == curve("sqrt", 50, alpha=0.8, beta=0.1)
    assert all(b > a for a, b in zip(two[1:40], three[1:40], strict=True))  # a fixed exponent 0.5 gives less than two


def test_exponential_starts_late_and_log_early_each_others_inverse() -> None:
    x = np.arange(1, 100) / 101
    late, early = (
        (np.array(curve(name, 101, alpha=1.0, beta=0.2)[1:-1]) - 0.2) / 0.8 for name in ("exponential", "log")
    )
    assert (late < x).all()
    assert (early > x).all()
    np.testing.assert_allclose(np.expm1(10 * early) / np.expm1(10), x, rtol=1e-9)  # exponential of log


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_step_has_stairs_of_one_height(steps: int) -> None:
    levels = np.unique(curve("step", 211, alpha=0.9, beta=0.3, steps=steps))
    np.testing.assert_allclose(levels, np.linspace(0.3, 1.0, steps + 1), rtol=1e-12)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("name", {"name": "cubic"}),
        ("t", {"t": 0}),
        ("t", {"t": 11}),
        ("T", {"T": 0}),
        ("alpha", {"alpha": -0.1}),
        ("alpha", {"alpha": 1.1}),
        ("alpha", {"alpha": math.nan}),
        ("beta", {"beta": 0.0}),
        ("beta", {"beta": 1.5}),
        ("beta", {"beta": math.nan}),
        ("p", {"p": 0.0}),
        ("p", {"p": math.inf}),
        ("steps", {"steps": 0}),
    ],
)
def test_pacing_names_the_argument_it_refuses(argument: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{argument}:"):
        pacing(**{"name": "linear", "t": 1, "T": 10, "alpha": 0.5, "beta": 0.5, **change})


SCORES = [3.0, 1.0, 2.0, 1.0, 3.0, 0.5]


@pytest.mark.parametrize(("name", "wanted"), [("easy_first", [5, 1, 3, 2, 0, 4]), ("hard_first", [0, 4, 2, 1, 3, 5])])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_order_is_stable_for_equal_scores(name: str, wanted: list[int], kind: Any) -> None:
    found = order(kind(SCORES), name)
    assert found.tolist() == wanted
    assert found.dtype == np.int64


@given(st.lists(st.integers(0, 5), max_size=60))
def test_easy_first_is_a_stable_sort(scores: list[int]) -> None:
    assert order(np.array(scores, dtype=np.float32)).tolist() == sorted(range(len(scores)), key=scores.__getitem__)
    assert order(np.array(scores), "hard_first").tolist() == sorted(range(len(scores)), key=lambda i: -scores[i])


def test_scores_of_any_number_type_are_ordered_by_value() -> None:
    for scores in (np.array([0, 1, 2, 3], np.uint8), np.array([False, True, True, True]), torch.arange(4)):
        assert order(scores, "hard_first")[-1] == 0
        assert order(scores, "easy_first")[0] == 0


def test_random_order_is_a_permutation_made_by_its_seed() -> None:
    a, b, c = (order(np.zeros(50), "random", seed=seed) for seed in (1, 1, 2))
    assert sorted(a.tolist()) == list(range(50))
    assert a.tolist() == b.tolist()
    assert a.tolist() != c.tolist()
    assert a.tolist() != list(range(50))


def test_order_refuses_what_it_cannot_sort() -> None:
    with pytest.raises(ValueError, match="scores: NaN at index 1"):
        order([1.0, math.nan])
    with pytest.raises(ValueError, match="scores: shape"):
        order(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="name: easy"):
        order([1.0], "easy")
    with pytest.raises(ValueError, match="seed"):
        order([1.0], "random")
    assert ORDERS == ("easy_first", "hard_first", "random")


@given(n=st.integers(0, 200), share=st.floats(1e-6, 1.0), batch_size=st.integers(1, 64))
def test_select_takes_the_first_share_and_at_least_a_batch(n: int, share: float, batch_size: int) -> None:
    ranked = np.random.default_rng(n).permutation(n)
    chosen = select(ranked, share, batch_size)
    assert chosen.tolist() == ranked[: len(chosen)].tolist()
    assert len(chosen) >= min(n, batch_size)
    assert len(chosen) == min(n, batch_size) or abs(len(chosen) - share * n) <= 0.5
    assert len(select(ranked, 1.0, batch_size)) == n


@pytest.mark.parametrize(("share", "wanted"), [(0.29, 29), (0.07, 7), (0.28, 28), (0.001, 4), (1.0, 100)])
def test_select_does_not_lose_or_gain_a_sample_by_rounding(share: float, wanted: int) -> None:
    assert len(select(np.arange(100), share, 4)) == wanted  # 0.29·100 < 29 and 0.07·100 > 7 in floating point


def test_select_refuses_shares_and_batches_of_nothing() -> None:
    for share in (0.0, -0.5, 1.01, math.nan):
        with pytest.raises(ValueError, match=r"^share:"):
            select([0, 1], share, 1)
    with pytest.raises(ValueError, match=r"^batch_size:"):
        select([0, 1], 0.5, 0)


@given(n=st.integers(0, 60), batch_size=st.integers(1, 17), seed=st.none() | st.integers(0, 9))
def test_batches_are_a_partition_of_the_selection(n: int, batch_size: int, seed: int | None) -> None:
    selection = np.random.default_rng(7).permutation(200)[:n]
    before = selection.copy()
    cut = batches(selection, batch_size, None if seed is None else np.random.default_rng(seed))
    assert [len(batch) for batch in cut] == [batch_size] * (n // batch_size) + [n % batch_size] * (n % batch_size > 0)
    joined = np.concatenate(cut) if cut else np.array([], dtype=np.int64)
    assert sorted(joined.tolist()) == sorted(selection.tolist())
    assert selection.tolist() == before.tolist()
    if seed is None:
        assert joined.tolist() == selection.tolist()


def test_batches_are_shuffled_by_their_generator_alone() -> None:
    cuts = [np.concatenate(batches(np.arange(40), 8, np.random.default_rng(seed))).tolist() for seed in (3, 3, 4)]
    assert cuts[0] == cuts[1]
    assert cuts[0] != cuts[2]
    assert cuts[0] != list(range(40))


def test_difficulty_of_a_batch_is_the_sum_over_its_samples() -> None:
    scores = torch.tensor(SCORES)
    cut = batches(order(scores), 4)
    np.testing.assert_allclose(batch_difficulty(scores, cut), [0.5 + 1 + 1 + 2, 3 + 3])
    assert batch_difficulty(scores, []).shape == (0,)


def test_batches_grouped_by_length_hold_every_sample_once_and_pad_less() -> None:
    rng = np.random.default_rng(0)
    lengths, selection = rng.integers(1, 64, 200), rng.permutation(200)[:90]

    def padding(parts: list[np.ndarray]) -> int:
        return sum(int(lengths[part].max()) * len(part) for part in parts)

    grouped = batches(selection, 16, np.random.default_rng(1), lengths=lengths)
    assert sorted(np.concatenate(grouped)) == sorted(selection)
    assert (np.diff([lengths[part].mean() for part in grouped]) < 0).any(), "short and long ones come in any order"
    assert padding(grouped) < 0.8 * padding(batches(selection, 16, np.random.default_rng(1)))
    assert [len(part) for part in batches(selection, 16, lengths=lengths)] == [16] * 5 + [10]
    same = batches(selection, 16, np.random.default_rng(1), lengths=lengths)
    assert all(np.array_equal(one, two) for one, two in zip(grouped, same, strict=True))


def test_a_stratified_order_holds_every_class_in_proportion_and_is_easy_first_inside_it() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(100) < 0.3).astype(np.int64)
    scores = rng.random(100) + 10.0 * labels  # class 1 looks harder throughout
    found = stratified_order(scores, labels)
    assert sorted(found) == list(range(100))
    for share in (0.2, 0.5, 0.8):
        first = labels[found[: round(100 * share)]]
        assert abs(first.mean() - labels.mean()) < 0.05
    for label in (0, 1):
        inside = scores[found[labels[found] == label]]
        assert (np.diff(inside) >= 0).all()
        hard = scores[(h := stratified_order(scores, labels, "hard_first"))[labels[h] == label]]
        assert (np.diff(hard) <= 0).all()
        drawn = stratified_order(scores, labels, "random", seed=1)
        assert abs(labels[drawn[:30]].mean() - labels.mean()) < 0.05
        assert (np.diff(scores[drawn[labels[drawn] == label]]) < 0).any()
    assert drawn.tolist() != stratified_order(scores, labels, "random", seed=2).tolist()
    with pytest.raises(ValueError, match="labels"):
        stratified_order(scores, labels[:5])
    with pytest.raises(ValueError, match="seed: None"):
        stratified_order(scores, labels, "random")


def test_a_stratified_order_puts_each_sample_at_the_middle_of_its_part_of_the_class() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1])  # keys 1/8, 3/8, 5/8, 7/8 and 1/4, 3/4
    assert stratified_order(np.arange(6), labels).tolist() == [0, 4, 1, 2, 5, 3]
