"""Partitions: every sample once, every device large enough, whatever the concentration and imbalance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibecfed.partition import PartitionError, apportion, partition, split_like

ALPHAS = [1e-320, 0.01, 1.0, 100.0, 1e300]


def labels_of(counts: list[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def assert_each_once(parts: list[np.ndarray], total: int) -> None:
    assert all(part.dtype == np.int64 for part in parts)
    assert all((np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(total))


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def mixes(parts: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])


@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 7, 60, 300]), min_size=1, max_size=6).filter(lambda c: sum(c) > 0),
    devices=st.integers(1, 12),
    min_size=st.integers(1, 9),
    scheme=st.sampled_from(["iid", "label"]),
    alpha=st.sampled_from(ALPHAS),
    size_alpha=st.sampled_from([None, *ALPHAS]),
    seed=st.integers(0, 2**32),
)
def test_every_sample_is_on_one_device_and_every_device_has_its_least(
    counts: list[int],
    devices: int,
    min_size: int,
    scheme: str,
    alpha: float,
    size_alpha: float | None,
    seed: int,
) -> None:
    labels = labels_of(counts)
    options = {"devices": devices, "scheme": scheme, "alpha": alpha, "size_alpha": size_alpha, "min_size": min_size}
    if len(labels) < devices * min_size:
        with pytest.raises(PartitionError, match=f"{len(labels)} samples are too few for {devices} devices"):
            partition(labels, seed=seed, **options)
        return
    parts = partition(labels, seed=seed, **options)
    assert len(parts) == devices
    assert_each_once(parts, len(labels))
    assert min(map(len, parts)) >= min_size
    assert same(parts, partition(labels, seed=seed, **options))


@given(
    group_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    devices=st.integers(1, 10),
    min_size=st.integers(1, 12),
    size_alpha=st.sampled_from([None, 0.01, 5.0]),
    seed=st.integers(0, 100),
)
def test_key_groups_stay_whole(
    group_sizes: list[int], devices: int, min_size: int, size_alpha: float | None, seed: int
) -> None:
    keys = [f"k{group}" for group in labels_of(group_sizes)]
    options = {"devices": devices, "scheme": "key", "keys": keys, "size_alpha": size_alpha, "min_size": min_size}
    try:
        parts = partition(np.zeros(len(keys), dtype=int), seed=seed, **options)
    except PartitionError:
        # Else a device with more than min_size + a group could give one away: no shortage without coarse groups.
        assert len(group_sizes) < devices or sum(group_sizes) < devices * (min_size + max(group_sizes))
        return
    assert_each_once(parts, len(keys))
    assert min(map(len, parts)) >= min_size
    owners = [{keys[index] for index in part} for part in parts]
    assert sum(map(len, owners)) == len(set(keys))


@pytest.mark.parametrize("scheme", ["iid", "label", "key"])
def test_seeds_tell_partitions_apart(scheme: str) -> None:
    labels = labels_of([150, 90, 60])
    keys = [f"k{index % 60}" for index in range(300)]
    parts = [partition(labels, devices=6, scheme=scheme, keys=keys, seed=seed) for seed in (0, 0, 1)]
    assert same(parts[0], parts[1])
    assert not same(parts[0], parts[2])


def test_global_random_state_is_neither_read_nor_moved() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    partition(labels_of([50, 50]), devices=4, scheme="label", seed=1)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("scheme", ["iid", "label", "key"])
def test_an_exact_fit_gives_every_device_its_least(scheme: str) -> None:
    labels = labels_of([1, 2, 53])
    parts = partition(labels, devices=7, scheme=scheme, keys=list(range(56)), alpha=0.01, min_size=8, seed=5)
    assert [len(part) for part in parts] == [8] * 7
    with pytest.raises(PartitionError, match=r"55 samples are too few for 7 devices with at least 8 each \(56 wanted"):
        partition(labels[:-1], devices=7, scheme=scheme, keys=list(range(55)), min_size=8, seed=5)


def test_sizes_follow_their_concentration() -> None:
    labels = labels_of([1000, 1000])

    def sizes(size_alpha: float | None) -> list[int]:
        parts = partition(labels, devices=20, scheme="label", size_alpha=size_alpha, seed=2)
        return sorted(map(len, parts))

    assert sizes(None) == [100] * 20
    assert sizes(1e5)[0] > 95
    assert sizes(0.01)[:15] == [8] * 15
    assert 8 < sizes(5.0)[2] < 80 < 120 < sizes(5.0)[-3] < 400


def test_label_skew_follows_its_concentration() -> None:
    labels = labels_of([600, 300, 100])

    def skew(alpha: float) -> float:
        counts = mixes(partition(labels, devices=20, scheme="label", alpha=alpha, size_alpha=None, seed=0), labels)
        return float(np.abs(counts / counts.sum(axis=1, keepdims=True) - [0.6, 0.3, 0.1]).sum(axis=1).mean())

    assert skew(1e4) < 0.05 < 0.2 < skew(1.0) < skew(0.05)


def test_drawn_class_shares_are_met_where_totals_allow() -> None:
    """The odds ratio of two devices and two classes is what scaling to the margins keeps: it must be the prior's."""
    labels = labels_of([7000, 3000])
    rng = np.random.default_rng(9)
    shares = rng.dirichlet(np.full(3, 1e6))  # as partition draws them: sizes, then priors
    priors = rng.dirichlet([3.0, 3.0], size=3)
    counts = mixes(partition(labels, devices=3, scheme="label", alpha=3.0, size_alpha=1e6, seed=9), labels)
    np.testing.assert_allclose(counts.sum(axis=1), shares * 10000, atol=1)
    odds, wanted = (table[:, 0] / table[:, 1] for table in (counts, priors))
    np.testing.assert_allclose(odds / odds[0], wanted / wanted[0], rtol=0.01)


def test_key_groups_are_balanced_or_sized() -> None:
    keys = [index % 97 for index in range(970)]
    labels = np.zeros(970, dtype=int)
    balanced = partition(labels, devices=10, scheme="key", keys=keys, size_alpha=None, seed=0)
    assert max(map(len, balanced)) - min(map(len, balanced)) <= 10
    sized = partition(labels, devices=10, scheme="key", keys=keys, size_alpha=2.0, seed=0)
    assert max(map(len, sized)) > 2 * min(map(len, sized))


def test_a_device_that_packing_left_short_is_filled_up() -> None:
    keys = [group for group, size in enumerate([30, 10, 9, 4, 4, 3]) for _ in range(size)]
    for seed in range(20):
        parts = partition(np.zeros(60, dtype=int), devices=3, scheme="key", keys=keys, size_alpha=0.01, seed=seed)
        assert_each_once(parts, 60)
        assert min(map(len, parts)) >= 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "label_skew"}, "scheme: 'label_skew', wanted one of 'iid', 'label', 'key'"),
        ({"devices": 0}, "devices, min_size: 0, "),
        ({"min_size": 0}, "devices, min_size: 4, 0, "),
        ({"alpha": 0.0}, r"alpha: 0\.0"),
        ({"alpha": float("nan")}, "alpha: nan"),
        ({"size_alpha": -1.0}, r"size_alpha: -1\.0"),
        ({"scheme": "key"}, "needs keys"),
        ({"scheme": "key", "keys": ["a"]}, "keys has 1 entries, wanted one for each of 80 samples"),
        ({"scheme": "key", "keys": ["a", "b"] * 40}, "2 key groups are too few for 4 devices"),
        ({"scheme": "key", "keys": ["a"] * 77 + ["b", "c", "d"]}, "largest 77 of 80 samples.*too coarse"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    options: dict[str, object] = {"devices": 4, "scheme": "iid", "min_size": 8, "seed": 0}
    with pytest.raises(PartitionError, match=message):
        partition(labels_of([40, 40]), **(options | change))


@pytest.mark.parametrize("labels", [np.array([]), np.array([0.5, 1.0]), np.array([-1, 0]), np.zeros((2, 2), dtype=int)])
def test_labels_must_be_class_indices(labels: np.ndarray) -> None:
    with pytest.raises(PartitionError, match="labels has shape"):
        partition(labels, devices=1, scheme="iid", min_size=1, seed=0)


@given(
    counts=st.lists(st.sampled_from([1, 5, 80, 300]), min_size=2, max_size=5),
    test_counts=st.lists(st.integers(0, 60), min_size=2, max_size=6),
    devices=st.integers(1, 8),
    alpha=st.sampled_from([0.01, 1.0]),
    seed=st.integers(0, 50),
)
def test_every_test_sample_is_on_one_device_and_no_device_has_none(
    counts: list[int], test_counts: list[int], devices: int, alpha: float, seed: int
) -> None:
    train, test = labels_of(counts), labels_of([*test_counts, 1])
    if len(train) < devices:
        return
    parts = partition(train, devices=devices, scheme="label", alpha=alpha, min_size=1, seed=seed)
    if len(test) < devices:
        with pytest.raises(PartitionError, match=f"{len(test)} test samples are too few for {devices} devices"):
            split_like(train, parts, test, seed=seed)
        return
    tests = split_like(train, parts, test, seed=seed)
    assert_each_once(tests, len(test))
    np.testing.assert_array_equal(list(map(len, tests)), apportion(list(map(len, parts)), len(test), low=1))
    assert same(tests, split_like(train, parts, test, seed=seed))


@pytest.mark.parametrize("alpha", [0.05, 1.0])
def test_the_test_set_has_each_devices_size_and_label_mix(alpha: float) -> None:
    train, test = labels_of([1200, 600, 200]), labels_of([300, 150, 50], seed=1)
    parts = partition(train, devices=20, scheme="label", alpha=alpha, seed=3)
    tests = split_like(train, parts, test, seed=3)
    # A quarter of every train count is a feasible split here, so nothing may be further from it than rounding.
    assert np.abs(mixes(tests, test) - mixes(parts, train) / 4).max() < 2
    assert np.abs(np.array([len(part) for part in tests]) - np.array([len(part) for part in parts]) / 4).max() <= 1


def test_sizes_hold_where_scaling_cannot_converge() -> None:
    """Device k has classes k and k−1, and the test set fits only if each takes class k alone: the margins are met in
    the limit of infinitely many sweeps."""
    train = np.concatenate([np.repeat([device, max(device - 1, 0)], 50) for device in range(4)])
    test = np.repeat(np.arange(4), 100)
    tests = split_like(train, list(np.arange(400).reshape(4, 100)), test, seed=0)
    assert_each_once(tests, 400)
    assert [len(part) for part in tests] == [100] * 4
    assert np.diag(mixes(tests, test)).min() > 95


def test_test_seeds_tell_splits_apart() -> None:
    labels = labels_of([60, 60])
    parts = partition(labels, devices=4, scheme="label", seed=0)
    assert not same(split_like(labels, parts, labels, seed=0), split_like(labels, parts, labels, seed=1))


def test_test_samples_follow_their_key() -> None:
    rng = np.random.default_rng(0)
    train, test = labels_of([200, 200]), labels_of([60, 60], seed=1)
    train_keys = rng.integers(0, 40, 400).tolist()
    test_keys = rng.integers(0, 45, 120).tolist()  # 40 … 44 are on no device
    parts = partition(train, devices=8, scheme="key", keys=train_keys, seed=0)
    tests = split_like(train, parts, test, seed=0, train_keys=train_keys, test_keys=test_keys)
    assert_each_once(tests, 120)
    for part, held in zip(parts, tests, strict=True):
        assert {test_keys[index] for index in held} <= {train_keys[index] for index in part} | {40, 41, 42, 43, 44}
    assert sum(any(test_keys[index] >= 40 for index in held) for held in tests) > 3


def test_a_device_whose_keys_have_no_test_sample_gets_one() -> None:
    train_keys = [0] * 10 + [1] * 10 + [2] * 10
    parts = [np.arange(10), np.arange(10, 20), np.arange(20, 30)]
    labels = np.zeros(30, dtype=int)
    tests = split_like(labels, parts, labels[:6], seed=0, train_keys=train_keys, test_keys=[0, 0, 0, 0, 1, 99])
    assert_each_once(tests, 6)
    assert [len(part) for part in tests] == [4, 1, 1]  # the one that nobody owns goes to the device without
    tests = split_like(labels, parts, np.zeros(4, dtype=int), seed=0, train_keys=train_keys, test_keys=[0, 0, 0, 0])
    assert [len(part) for part in tests] == [2, 1, 1]


def test_split_like_refuses_half_of_the_keys_and_empty_parts() -> None:
    labels, parts = np.zeros(4, dtype=int), [np.arange(2), np.arange(2, 4)]
    with pytest.raises(PartitionError, match="give both or neither"):
        split_like(labels, parts, labels, seed=0, train_keys=[0, 0, 1, 1])
    with pytest.raises(PartitionError, match="need one key for each label"):
        split_like(labels, parts, labels, seed=0, train_keys=[0, 0, 1, 1], test_keys=[0])
    with pytest.raises(PartitionError, match="a device without samples"):
        split_like(labels, [np.arange(4), np.arange(0)], labels, seed=0)


@given(
    cells=st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=12),
    fill=st.floats(0, 1),
)
def test_apportioned_counts_keep_sum_and_bounds(cells: list[tuple[float, int, int]], fill: float) -> None:
    weights, low = np.array([cell[0] for cell in cells]), np.array([cell[1] for cell in cells])
    high = low + np.array([cell[2] for cell in cells])
    total = int(low.sum() + round(fill * (high - low).sum()))
    counts = apportion(weights, total, low=low, high=high)
    assert counts.sum() == total
    assert (counts >= low).all()
    assert (counts <= high).all()
    for wrong in (int(low.sum()) - 1, int(high.sum()) + 1):
        with pytest.raises(PartitionError, match="cannot be split within bounds"):
            apportion(weights, wrong, low=low, high=high)


def test_apportioned_counts_are_in_proportion() -> None:
    np.testing.assert_array_equal(apportion([5, 3, 2], 10), [5, 3, 2])
    np.testing.assert_array_equal(apportion([1, 1, 1], 8), [3, 3, 2])
    np.testing.assert_array_equal(apportion([97, 2, 1], 100, low=8), [84, 8, 8])
    np.testing.assert_array_equal(apportion([50, 30, 20], 100, high=[10, 100, 100]), [10, 54, 36])
    np.testing.assert_array_equal(apportion([0, 0], 3, high=[1, 5]), [1, 2])
    np.testing.assert_array_equal(apportion([1, 0], 3, high=[2, 5]), [2, 1])
