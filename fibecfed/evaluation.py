"""How good the models are: global and personal accuracy, and beside it Matthews correlation and F1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .client import Client
from .federation import Federation
from .server import LocalStore, Server, weighted_mean


def evaluate(
    fed: Federation, client: Client, server: Server, store: LocalStore, on_phase: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Global accuracy (local layers at their initial value) and metrics; personal accuracy if the configuration asks.

    Personal: each device's own model, GAL and head from the server with its own local layers, on its own test samples,
    weighted by n_k. Returns the fields of a RoundRecord.
    """
    found = evaluate_global(fed, client, server, store)
    if fed.config.eval.personal:
        labels, own = fed.task.test.labels, []
        for place, device in enumerate(fed.devices):
            on_phase("evaluate", place + 1, len(fed.devices))
            store.load(place)
            own.append(float((client.predict(device.test) == labels[device.test]).mean()))
        found["personal_accuracy"] = weighted_mean(own, fed.sizes)
    return found


def evaluate_global(fed: Federation, client: Client, server: Server, store: LocalStore) -> dict[str, Any]:
    """The global half of :func:`evaluate`, on the whole test set."""
    labels = fed.task.test.labels
    server.put()
    store.reset()
    measured = measures(labels, client.predict(np.arange(len(labels))), len(fed.task.classes))
    return {"global_accuracy": measured.pop("accuracy"), "global_metrics": measured}


def measures(labels: np.ndarray, predicted: np.ndarray, classes: int) -> dict[str, float]:
    """accuracy in [0, 1]; matthews (multi-class R_K, 0 when a side is constant); f1 of class 1 for two classes.

    Args: labels, predicted: int (n,), n ≥ 1. Raises ValueError for other shapes.
    Source: Gorodkin, 2004, for R_K (CoLA's measure); F1 as for MRPC in GLUE.
    """
    if labels.shape != predicted.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels {labels.shape}, predicted {predicted.shape}: wanted the same (n,), n ≥ 1")
    confusion = np.zeros((classes, classes), dtype=np.float64)
    np.add.at(confusion, (labels, predicted), 1.0)
    total, right = confusion.sum(), confusion.trace()
    true, said = confusion.sum(1), confusion.sum(0)
    spread = (total**2 - (true**2).sum()) * (total**2 - (said**2).sum())
    found = {"accuracy": float(right / total)}
    found["matthews"] = float((right * total - true @ said) / np.sqrt(spread)) if spread > 0 else 0.0
    if classes == 2:
        found["f1"] = float(2 * confusion[1, 1] / max(1.0, true[1] + said[1]))
    return found
