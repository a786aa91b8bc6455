"""Accuracy, Matthews correlation and F1 by hand; the modelled link."""

from __future__ import annotations

import numpy as np
import pytest

from fibecfed.evaluation import measures
from fibecfed.sections import Wire
from fibecfed.server import link_seconds, weighted_mean


def test_measures_of_two_classes_by_hand() -> None:
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    predicted = np.array([1, 1, 0, 0, 0, 1, 0, 1])  # tp 3, fn 1, tn 3, fp 1
    found = measures(labels, predicted, 2)
    assert found["accuracy"] == 6 / 8
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["matthews"] == pytest.approx((3 * 3 - 1 * 1) / np.sqrt(4 * 4 * 4 * 4))


def test_matthews_is_that_of_the_covariances_for_many_classes() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 6, 300), rng.integers(0, 6, 300)
    predicted[:150] = labels[:150]
    x, y = np.eye(6)[labels], np.eye(6)[predicted]

    def covariance(a: np.ndarray, b: np.ndarray) -> float:
        return float(((a - a.mean(0)) * (b - b.mean(0))).sum())

    wanted = covariance(x, y) / np.sqrt(covariance(x, x) * covariance(y, y))
    found = measures(labels, predicted, 6)
    assert found["matthews"] == pytest.approx(wanted)
    assert "f1" not in found


def test_a_constant_answer_has_no_correlation() -> None:
    assert measures(np.array([0, 1, 1]), np.array([1, 1, 1]), 2)["matthews"] == 0.0
    with pytest.raises(ValueError, match="labels"):
        measures(np.zeros(3, dtype=int), np.zeros(2, dtype=int), 2)


def test_means_are_weighted_and_the_link_counts_latency_and_bits() -> None:
    assert weighted_mean([1.0, 0.0], [3, 1]) == 0.75
    wire = Wire(up_mbit=8.0, down_mbit=80.0, latency_ms=50.0)
    assert link_seconds(wire, 1_000_000) == pytest.approx(0.1 + 1.0 + 0.1)
