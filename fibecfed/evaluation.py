"""Classification measures: accuracy, and beside it Matthews correlation and F1 where there are two classes."""

from __future__ import annotations

import numpy as np


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
