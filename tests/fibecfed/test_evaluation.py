"""Accuracy, Matthews correlation and F1 by hand; whose model is measured on what; the modelled link."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fibecfed.evaluation import evaluate, measures
from fibecfed.sections import Wire
from fibecfed.server import link_seconds, weighted_mean

from .federated import SIZES, TEST_SIZES, buffer, federation, halves, make_client


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
    for shape, other in ((3, 2), (0, 0), ((2, 2), (2, 2))):
        with pytest.raises(ValueError, match="labels"):
            measures(np.zeros(shape, dtype=int), np.zeros(other, dtype=int), 2)


def test_f1_of_a_class_nobody_named_is_0() -> None:
    assert measures(np.array([0, 0]), np.array([0, 0]), 2)["f1"] == 0.0


def test_the_f1_is_that_of_class_1() -> None:
    found = measures(np.array([1, 0, 0, 0]), np.array([0, 0, 0, 1]), 2)  # tp 0
    assert found["f1"] == 0.0
    assert found["matthews"] == pytest.approx((0 * 2 - 1 * 1) / np.sqrt(1 * 1 * 3 * 3))


def test_means_are_weighted_and_the_link_counts_latency_and_bits() -> None:
    assert weighted_mean([1.0, 0.0], [3, 1]) == 0.75
    wire = Wire(up_mbit=8.0, down_mbit=80.0, latency_ms=50.0)
    assert link_seconds(wire, 1_000_000, 2_000_000) == pytest.approx(0.1 + 1.0 + 0.2)


@pytest.mark.parametrize("personal", [True, False])
def test_every_model_is_measured_on_its_own_test_samples(personal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = federation(f"eval.personal={str(personal).lower()}")
    (server, store), client, labels = halves(fed), make_client(fed, (1,)), fed.task.test.labels
    fed.flat.copy_(torch.full_like(fed.flat.data, 9.0))
    right = (labels + np.isin(np.arange(len(labels)), fed.devices[1].test)) % 3  # wrong on device 1 alone
    right[fed.devices[2].test[0]] = (labels[fed.devices[2].test[0]] + 1) % 3  # and once on device 2
    seen: list[tuple[torch.Tensor, list[int]]] = []
    phases: list[tuple[str, int, int]] = []

    def predict(samples: np.ndarray) -> np.ndarray:
        seen.append((fed.flat.data.detach().clone(), samples.tolist()))
        return right[samples]

    monkeypatch.setattr(client, "predict", predict)
    found: dict[str, Any] = evaluate(fed, client, server, store, lambda *phase: phases.append(phase))
    models = [store.initial, *store.rows]
    samples = [list(range(len(labels))), *(device.test.tolist() for device in fed.devices)]
    assert len(seen) == (4 if personal else 1)
    for (held, on), local, own in zip(seen, models, samples, strict=False):
        assert torch.equal(held, buffer(fed, server, local))
        assert on == own
    assert found["global_accuracy"] == pytest.approx((TEST_SIZES[0] + TEST_SIZES[2] - 1) / sum(TEST_SIZES))
    assert found["global_metrics"].keys() == {"matthews"}
    if not personal:
        assert "personal_accuracy" not in found
        return
    assert found["personal_accuracy"] == pytest.approx((SIZES[0] * 1.0 + SIZES[2] * 3 / 4) / sum(SIZES))
    assert phases == [("evaluate", k, 3) for k in (1, 2, 3)]
