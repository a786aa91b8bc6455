"""Who holds which sample: seeded partitions of a training set over devices, and of the test set in their likeness.

Nothing here draws until a condition holds. Sizes and label counts are found by scaling and rounding, so every call ends
after a number of steps known beforehand, whatever the concentration, the imbalance and the seed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Scheme = Literal["iid", "label", "key"]
Indices = NDArray[np.int64]

_SWEEPS = 200  # of row and column scaling; a bound, since extreme priors converge too slowly to wait for
_FLOOR = 1e-9  # the least share of a class in a device's prior: a count that margins demand stays reachable


class PartitionError(ValueError):
    """A partition that cannot be made: too few samples, too few key groups, or arguments out of range."""


def partition(
    labels: ArrayLike,
    *,
    devices: int,
    scheme: Scheme,
    keys: Sequence[Hashable] | None = None,
    alpha: float = 1.0,
    size_alpha: float | None = 5.0,
    min_size: int = 8,
    seed: int,
) -> list[Indices]:
    """Split samples over devices: each sample on exactly one device, each device with at least ``min_size`` samples.

    Device sizes follow Dirichlet(``size_alpha``), raised to ``min_size`` where the draw is smaller; None: equal sizes.

    * ``"iid"``: samples at random.
    * ``"label"``: device k draws class shares q_k ~ Dirichlet(``alpha``). Its counts are those of the matrix with the
      devices' sizes and the classes' totals as margins that is closest, in relative entropy, to size_k · q_kc.
    * ``"key"``: samples of one key stay together; the largest go first, each to the device that is furthest below
      its size. ``alpha`` is not used.

    Termination: sizes are one scaling and one rounding; label counts are a fixed number of scaling sweeps and one
    rounding a device that keeps both margins exactly, so nothing has to be drawn again; key groups are placed once
    each, and every later move lowers the whole-number shortage Σ_k max(0, min_size − n_k), which cannot go below 0.

    Args:
        labels: (n,) class indices ≥ 0. Only their number matters unless ``scheme`` is ``"label"``.
        devices: number of devices, ≥ 1.
        keys: (n,) the natural owner of each sample (an author, a film); needed by ``"key"`` and unused otherwise.
        alpha: concentration of the class shares, > 0: small is skewed, large is alike.
        size_alpha: concentration of the sizes, > 0, or None.
        min_size: least number of samples on a device, ≥ 1.
        seed: same arguments and seed, same partition.

    Returns:
        ``devices`` ascending int64 arrays of sample indices.

    Raises:
        PartitionError: n < devices · min_size, fewer key groups than devices, groups too coarse for ``min_size``, or an
            argument out of range.

    The defaults of ``alpha`` and ``size_alpha`` are the set-up of Liu et al., EMNLP 2024; the scaling is ours.
    """
    classes = _class_indices("labels", labels)
    total = len(classes)
    if scheme not in get_args(Scheme):
        raise PartitionError(f"scheme: {scheme!r}, wanted one of {', '.join(map(repr, get_args(Scheme)))}")
    if devices < 1 or min_size < 1:
        raise PartitionError(f"devices, min_size: {devices}, {min_size}, wanted both ≥ 1")
    for name, value in (("alpha", alpha), ("size_alpha", size_alpha)):
        if value is not None and not 0 < value < float("inf"):
            raise PartitionError(f"{name}: {value}, wanted a finite number > 0")
    if total < devices * min_size:
        raise PartitionError(
            f"{total} samples are too few for {devices} devices with at least {min_size} each "
            f"({devices * min_size} wanted): lower devices or min_size"
        )
    rng = np.random.default_rng(seed)
    shares = np.ones(devices) if size_alpha is None else rng.dirichlet(np.full(devices, size_alpha))
    sizes = apportion(shares, total, low=min_size)
    if scheme == "iid":
        return _cut(rng.permutation(total), sizes)
    if scheme == "label":
        priors = rng.dirichlet(np.full(int(classes.max()) + 1, alpha), size=devices)
        return _deal(classes, priors, sizes, rng)
    if keys is None:
        raise PartitionError('scheme "key" needs keys, one for each sample')
    if len(keys) != total:
        raise PartitionError(f"keys has {len(keys)} entries, wanted one for each of {total} samples")
    return _pack_groups(keys, sizes, min_size, rng)


def split_like(
    train_labels: ArrayLike,
    train_parts: Sequence[Indices],
    test_labels: ArrayLike,
    *,
    seed: int,
    train_keys: Sequence[Hashable] | None = None,
    test_keys: Sequence[Hashable] | None = None,
) -> list[Indices]:
    """Split the test set over the devices of ``train_parts``: sizes ∝ train sizes, label mixes as near as totals allow.

    Every test sample is on exactly one device and every device has at least one. Label counts are found as in
    ``partition(scheme="label")``, with each device's own label shares in place of a drawn prior.

    With ``train_keys`` and ``test_keys`` (for a partition by key) a test sample follows the device that holds its key;
    samples whose key no device holds are split as above. A device that would stay without a test sample gets one of
    those, or one from the device that has the most.

    Args:
        train_labels: (n,) class indices. train_parts: per device, indices into them. test_labels: (m,) class indices.
        seed: same arguments and seed, same split.

    Returns:
        One ascending int64 array of test indices per device.

    Raises:
        PartitionError: fewer test samples than devices, an empty part, or only one of the two key lists.
    """
    train, test = _class_indices("train_labels", train_labels), _class_indices("test_labels", test_labels)
    devices, rng = len(train_parts), np.random.default_rng(seed)
    sizes = np.array([len(part) for part in train_parts], dtype=np.int64)
    if devices == 0 or sizes.min() == 0:
        raise PartitionError("train_parts has no device, or a device without samples")
    if len(test) < devices:
        raise PartitionError(f"{len(test)} test samples are too few for {devices} devices with at least 1 each")
    if (train_keys is None) != (test_keys is None):
        raise PartitionError("train_keys and test_keys belong together: give both or neither")
    count = int(max(train.max(), test.max())) + 1
    priors = np.stack([np.bincount(train[part], minlength=count) for part in train_parts]).astype(np.float64)

    owned: list[Indices] = [np.empty(0, dtype=np.int64)] * devices
    free = np.arange(len(test), dtype=np.int64)
    if train_keys is not None and test_keys is not None:
        if len(train_keys) != len(train) or len(test_keys) != len(test):
            raise PartitionError("train_keys and test_keys need one key for each label")
        owner = {train_keys[index]: device for device, part in enumerate(train_parts) for index in part}
        holder = np.array([owner.get(key, -1) for key in test_keys], dtype=np.int64)
        owned, free = [np.flatnonzero(holder == device) for device in range(devices)], np.flatnonzero(holder < 0)
        while sum(len(part) == 0 for part in owned) > len(free):  # pigeonhole: then some device has two or more
            richest = max(range(devices), key=lambda device: len(owned[device]))
            position = int(rng.integers(len(owned[richest])))
            free = np.append(free, owned[richest][position])
            owned[richest] = np.delete(owned[richest], position)
    quota = apportion(sizes, len(free), low=np.array([len(part) == 0 for part in owned]))
    dealt = _deal(test[free], priors, quota, rng)
    return [np.sort(np.concatenate([own, free[part]])) for own, part in zip(owned, dealt, strict=True)]


def apportion(weights: ArrayLike, total: int, *, low: ArrayLike = 0, high: ArrayLike | None = None) -> Indices:
    """Whole numbers that sum to ``total``, in proportion to ``weights`` (k,) ≥ 0 and within ``low`` ≤ x ≤ ``high``.

    x is clip(c · weights, low, high) with the c that gives the sum (found exactly: the sum is piecewise linear in c),
    rounded by largest remainder. Raises PartitionError when no numbers within the bounds can sum to ``total``.
    """
    weight = np.asarray(weights, dtype=np.float64)
    lower = np.broadcast_to(np.asarray(low, dtype=np.float64), weight.shape)
    upper = np.broadcast_to(np.asarray(total if high is None else high, dtype=np.float64), weight.shape)
    upper = np.maximum(np.minimum(upper, total), lower)
    if not lower.sum() <= total <= upper.sum():
        raise PartitionError(f"{total} cannot be split within bounds that sum to {lower.sum():g} … {upper.sum():g}")
    # A weight of 0 takes its share only once all others are full, and then must be able to.
    weight = np.maximum(weight / (weight.max(initial=0.0) or 1.0), 1e-12)
    corners = np.unique(np.concatenate([[0.0], lower / weight, upper / weight]))
    sums = np.array([np.clip(corner * weight, lower, upper).sum() for corner in corners])
    right = min(int(np.searchsorted(sums, total)), len(corners) - 1)
    left = max(right - 1, 0)
    below, above = (np.clip(corners[side] * weight, lower, upper) for side in (left, right))
    step = (total - sums[left]) / (sums[right] - sums[left]) if sums[right] > sums[left] else 0.0
    exact = below + step * (above - below)
    counts = np.floor(exact).astype(np.int64)
    rest = int(total - counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return counts


def _deal(classes: Indices, priors: NDArray[np.float64], sizes: Indices, rng: np.random.Generator) -> list[Indices]:
    """Give device k ``sizes[k]`` samples with label shares as near ``priors[k]`` as the classes' totals allow."""
    counts = _counts(priors, sizes, np.bincount(classes, minlength=priors.shape[1]))
    parts: list[list[Indices]] = [[] for _ in sizes]
    for label in range(priors.shape[1]):
        samples = rng.permutation(np.flatnonzero(classes == label))
        for part, piece in zip(parts, np.split(samples, np.cumsum(counts[:-1, label])), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)).astype(np.int64) for part in parts]


def _counts(priors: NDArray[np.float64], sizes: Indices, totals: Indices) -> Indices:
    """Counts (devices, classes) with row sums ``sizes`` and column sums ``totals``, as near sizes · priors as may be.

    Rows and columns are scaled in turn (iterative proportional fitting, Deming and Stephan 1940), then rounded row by
    row. What rounding took from a class is added to the next row's wish, so errors do not add up; a row may take at
    most what is left of a class, and all that is left sums to all that rows still want: each row can be filled, and the
    last one takes exactly the rest.
    """
    wish = np.maximum(priors / priors.sum(axis=1, keepdims=True), _FLOOR) * sizes[:, None]
    for _ in range(_SWEEPS):
        columns = wish.sum(axis=0)
        wish *= np.divide(totals, columns, out=np.zeros_like(columns), where=columns > 0)
        rows = wish.sum(axis=1)
        wish *= np.divide(sizes, rows, out=np.zeros_like(rows), where=rows > 0)[:, None]
    counts = np.zeros(wish.shape, dtype=np.int64)
    left, carry = totals.astype(np.int64), np.zeros(len(totals))
    for row, size in enumerate(sizes):
        carry += wish[row]
        counts[row] = apportion(np.maximum(carry, 0.0), int(size), high=left)
        carry -= counts[row]
        left = left - counts[row]
    return counts


def _pack_groups(keys: Sequence[Hashable], sizes: Indices, min_size: int, rng: np.random.Generator) -> list[Indices]:
    members: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    groups = list(members.values())
    if len(groups) < len(sizes):
        raise PartitionError(f"{len(groups)} key groups are too few for {len(sizes)} devices, wanted at least one each")
    order = rng.permutation(len(groups))  # seeds the order among groups of one size
    order = order[np.argsort([-len(groups[group]) for group in order], kind="stable")]
    held: list[list[int]] = [[] for _ in sizes]
    missing = rng.permutation(sizes)
    for group in order:
        device = int(np.argmax(missing))
        held[device].append(int(group))
        missing[device] -= len(groups[group])
    count = np.array([sum(len(groups[group]) for group in part) for part in held])
    while count.min() < min_size:
        poorest = int(np.argmin(count))
        spare = [  # (samples the donor keeps above min_size, donor, group): the move that leaves the donor richest
            (int(count[donor]) - len(groups[group]) - min_size, donor, group)
            for donor in np.flatnonzero(count > min_size).tolist()
            for group in held[donor]
        ]
        kept, donor, group = max(spare, default=(-1, -1, -1))
        if kept < 0:
            raise PartitionError(
                f"{len(groups)} key groups (largest {len(groups[order[0]])} of {len(keys)} samples) are too coarse: "
                f"a device would have {int(count.min())} samples, wanted at least {min_size}; lower devices or min_size"
            )
        held[donor].remove(group)
        held[poorest].append(group)
        count[donor] -= len(groups[group])
        count[poorest] += len(groups[group])
    return [np.sort(np.concatenate([np.array(groups[group], dtype=np.int64) for group in part])) for part in held]


def _cut(order: Indices, sizes: Indices) -> list[Indices]:
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]


def _class_indices(name: str, labels: ArrayLike) -> Indices:
    array = np.asarray(labels)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iu" or int(array.min()) < 0:
        raise PartitionError(
            f"{name} has shape {array.shape} and dtype {array.dtype}, wanted (n ≥ 1,) class indices ≥ 0"
        )
    return array.astype(np.int64)
