"""Which neurons a device updates: importance of rows from the Fisher diagonal, momentum, row masks.

A *row* is a neuron: row j of a LoRA B is output neuron j, row i of a LoRA A is rank component i [ours].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor


def row_importance(diag: Tensor, row_lengths: Tensor) -> Tensor:
    """Importance of every row: the sum of the Fisher diagonal over its parameters [paper].

    Args:
        diag: float (numel,), the diagonal in the order of the flat buffer.
        row_lengths: int64 (num_rows,), values in each row; they add up to numel.

    Returns float32 (num_rows,), summed in float64. Raises ValueError when the shapes do not fit.
    """
    if diag.dim() != 1 or row_lengths.dim() != 1 or int(row_lengths.sum()) != diag.numel():
        raise ValueError(
            f"diag: shape {tuple(diag.shape)}, wanted ({int(row_lengths.sum())},), "
            f"the sum of row_lengths, shape {tuple(row_lengths.shape)}"
        )
    lengths = row_lengths.to(diag.device)
    return torch.segment_reduce(diag.detach().double(), "sum", lengths=lengths).float()


def smooth(previous: Tensor | None, new: Tensor, gamma: float) -> Tensor:
    """Momentum of the Fisher diagonal (or of anything summed from it) over participations [paper]::

        F_t = γ·F_{t−1} + (1 − γ)·F̃_t;   F_1 = F̃_1

    ``previous`` and ``new`` have one shape; neither is changed. Raises ValueError for other shapes, γ not in [0, 1).
    """
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"gamma: {gamma}, wanted 0 ≤ gamma < 1")
    if previous is None:
        return new.clone()
    if previous.shape != new.shape:
        raise ValueError(f"new: shape {tuple(new.shape)}, wanted {tuple(previous.shape)} as previous")
    return gamma * previous + (1 - gamma) * new


def row_mask(
    importance: Tensor,
    rows_by_layer: Mapping[int, slice],
    gal: Collection[int],
    share: float | Mapping[int, float],
) -> Tensor:
    """Rows that a device updates: all of the GAL and the head, the most important ones of each local layer [paper].

    A local layer keeps its best round(share·rows) rows, at least one when share > 0 and none when it is 0; of equally
    important rows the one with the lower index [ours]. Rows of A (d_in values each) and of B (r values each) compete
    within their layer. At the start B = 0 makes every gradient of A zero: importance measured then puts all rows of B
    before any row of A, until it is refreshed.

    Args:
        importance: float (num_rows,), higher is kept.
        rows_by_layer: rows of each transformer block; rows in none of them (the head) are active.
        gal: layers that are trained whole.
        share: share of active rows in [0, 1], one for all local layers or one for each.

    Returns bool (num_rows,) on the device of ``importance``. Raises ValueError naming the argument.
    """
    _check_importance(importance, rows_by_layer)
    if unknown := sorted(set(gal) - set(rows_by_layer)):
        raise ValueError(f"gal: no such layers {unknown}, wanted layers of rows_by_layer {sorted(rows_by_layer)}")
    mask = torch.ones(importance.numel(), dtype=torch.bool, device=importance.device)
    for layer, rows in rows_by_layer.items():
        if layer in gal:
            continue
        kept = _share_of(share, layer)
        mask[rows] = False
        mask[rows.start + _best(importance[rows], kept)] = True
    return mask


def lowest_active_layer(mask: Tensor, rows_by_layer: Mapping[int, slice]) -> int | None:
    """The lowest layer with an active row, below which backward need not go; None when no layer has one."""
    return min((layer for layer, rows in rows_by_layer.items() if bool(mask[rows].any())), default=None)


def _best(importance: Tensor, share: float) -> Tensor:
    """Indices of the best round(share·rows) values, at least one when share > 0; ties: lower index."""
    count = round(share * importance.numel())
    if share > 0.0:
        count = max(count, 1)
    return importance.sort(descending=True, stable=True).indices[:count]


def _share_of(share: float | Mapping[int, float], layer: int) -> float:
    if isinstance(share, Mapping):
        if layer not in share:
            raise ValueError(f"share: no value for local layer {layer}, wanted one for each")
        share = share[layer]
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share: {share} for layer {layer}, wanted 0 ≤ share ≤ 1")
    return share


def _check_importance(importance: Tensor, rows_by_layer: Mapping[int, slice]) -> None:
    if importance.dim() != 1 or bool(importance.isnan().any()):
        raise ValueError(f"importance: shape {tuple(importance.shape)} or NaN inside, wanted (num_rows,) numbers")
    for layer, rows in rows_by_layer.items():
        if not 0 <= rows.start <= rows.stop <= importance.numel() or rows.step not in (None, 1):
            raise ValueError(f"rows_by_layer: {rows} for layer {layer}, wanted a slice inside 0 … {importance.numel()}")
