"""Rows of a run as Markdown: what ours takes, how near that is to the machine's limit, and what others take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from .results import Row, latest

T = TypeVar("T")

OURS = ("fibecfed", "fibecfed float32")  # the provider that ratios are to; the first that is there


def table(rows: Iterable[Row], benchmark: str, mode: str = "cold") -> str:
    """The last run of a benchmark on each device, a line a shape and dtype.

    The others' columns are their time over ours: above 1 they are slower, below 1 faster. "wrong": its result was not
    right, so it has no time. Raises ValueError when there is no row, or none of ours.
    """
    of = [row for row in latest(rows, benchmark) if row.mode == mode]
    if not of:
        raise ValueError(f"benchmark {benchmark!r}: no {mode} rows")
    return "\n\n".join(
        _of_device([row for row in of if row.device == device]) for device in _unique(r.device for r in of)
    )


def _of_device(rows: Sequence[Row]) -> str:
    providers = _unique(row.provider for row in rows)
    ours = next((name for name in OURS if name in providers), None)
    if ours is None:
        raise ValueError(f"{rows[0].benchmark}: no rows of {' or '.join(OURS)}")
    others = [name for name in providers if name != ours]
    first = rows[0]
    lines = [
        f"{first.device}, {first.threads} threads, torch {first.torch}, commit {first.commit}, {first.run}:",
        "",
        f"| shape | dtype | {ours}, ms | % of limit | {' | '.join(others)} |",
        f"|{'---|' * (4 + len(others))}",
    ]
    for shape, dtype in _unique((row.shape, row.dtype) for row in rows):
        found = {row.provider: row for row in rows if (row.shape, row.dtype) == (shape, dtype)}
        own = found[ours]
        share = "–" if own.floor_percent is None else f"{own.floor_percent:.0f} ({own.limit})"
        cells = [shape, dtype, "wrong" if own.ms50 is None else _number(own.ms50), share]
        lines.append(f"| {' | '.join([*cells, *(_ratio(found.get(name), own) for name in others)])} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(other: Row | None, own: Row) -> str:
    if other is None or own.ms50 is None:
        return ""
    return "wrong" if other.ms50 is None else f"{other.ms50 / own.ms50:.2f}"


def _unique(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))
