"""Rows of a run as Markdown: what ours takes, how near that is to the machine's limit, and what others take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from .results import Row, latest, of_mode

T = TypeVar("T")

OURS = ("fibecfed", "fibecfed float32")  # the provider that ratios are to; the first that is there


def table(rows: Iterable[Row], benchmark: str, mode: str = "cold", memory: bool = False) -> str:
    """The last run of a benchmark on each device, a line a shape and dtype; with ``memory`` another one for the memory
    that was needed at the peak.

    The others' columns are their time (or memory) over ours: above 1 they are slower, below 1 faster. "wrong": its
    result was not right, so it has no time. Raises ValueError when there is no row, or none of ours.
    """
    of = _measured(rows, benchmark, mode)
    return "\n\n".join(
        _of_device([row for row in of if row.device == device], memory) for device in _unique(r.device for r in of)
    )


def summary(rows: Iterable[Row], lines: Sequence[tuple[str, str, str, str, str, Sequence[str]]]) -> str:
    """One line a (what, benchmark, shape, dtype, mode, peers) of each benchmark's last run on any device: ours and the
    peers' time over ours. Raises ValueError for one that was not measured."""
    known = list(rows)
    found = ["| | shape | ours, ms | % of limit | others over ours | machine |", "|---|---|---|---|---|---|"]
    for what, benchmark, shape, dtype, mode, peers in lines:
        of = [r for r in latest(known, benchmark) if (r.shape, r.dtype, r.mode) == (shape, dtype, mode)]
        newest = max((row.run for row in of), default="")
        by_name = {row.provider: row for row in of if row.run == newest}
        own = next((by_name[name] for name in OURS if name in by_name), None)
        if own is None or own.ms50 is None or (missing := [name for name in peers if name not in by_name]):
            raise ValueError(f"{benchmark}, {shape}, {dtype}, {mode}: {missing if own else 'ours'} not measured")
        ratios = ", ".join(f"{name} {_ratio(by_name[name], own)}" for name in peers)
        share = "–" if own.floor_percent is None else f"{own.floor_percent:.0f}"
        found.append(f"| {what} | {shape} | {_number(own.ms50)} | {share} | {ratios} | {own.device} |")
    return "\n".join(found)


def by_rank(rows: Iterable[Row], benchmark: str, peer: str, mode: str = "cold") -> str:
    """A benchmark's last run on each device, a line a shape but for its rank r, a column a rank: a peer's time over
    ours, and ours as share of the machine's limit. Raises ValueError when there is no row."""
    of = _measured(rows, benchmark, mode)
    ranks = sorted({int(row.shape.rpartition("=")[2]) for row in of})
    found = []
    for device in _unique(row.device for row in of):
        known = {(r.shape, r.dtype, r.provider): r for r in of if r.device == device}
        lines = [
            _caption(next(iter(known.values()))),
            "",
            f"| {peer} over {OURS[0]} (% of limit) | dtype | {' | '.join(f'r={r}' for r in ranks)} |",
            f"|{'---|' * (2 + len(ranks))}",
        ]
        for head, dtype in _unique((shape.rpartition(" ")[0], dtype) for shape, dtype, _ in known):
            cells = []
            for r in ranks:
                own, other = (known.get((f"{head} r={r}", dtype, name)) for name in (OURS[0], peer))
                share = "" if own is None or own.floor_percent is None else f" ({own.floor_percent:.0f})"
                cells.append("" if own is None else f"{_ratio(other, own)}{share}")
            lines.append(f"| {' | '.join([head, dtype, *cells])} |")
        found.append("\n".join(lines))
    return "\n\n".join(found)


def _measured(rows: Iterable[Row], benchmark: str, mode: str) -> list[Row]:
    of = of_mode(latest(rows, benchmark), mode)
    if not of:
        raise ValueError(f"benchmark {benchmark!r}: no {mode} rows")
    return of


def _caption(row: Row) -> str:
    return f"{row.device}, {row.threads} threads, torch {row.torch}, commit {row.commit}, {row.run}, {row.mode}:"


def _of_device(rows: Sequence[Row], memory: bool) -> str:
    providers = _unique(row.provider for row in rows)
    ours = next((name for name in OURS if name in providers), None)
    if ours is None:
        raise ValueError(f"{rows[0].benchmark}: no rows of {' or '.join(OURS)}")
    others = [name for name in providers if name != ours]
    lines = [
        _caption(rows[0]),
        "",
        f"| shape | dtype | {ours}, ms | % of limit | {' | '.join(others)} |",
        f"|{'---|' * (4 + len(others))}",
    ]
    for shape, dtype in _unique((row.shape, row.dtype) for row in rows):
        found = {row.provider: row for row in rows if (row.shape, row.dtype) == (shape, dtype)}
        own = found[ours]
        share = "–" if own.floor_percent is None else f"{own.floor_percent:.0f} ({own.limit})"
        cells = [shape, dtype, "wrong" if own.ms50 is None else _number(own.ms50), share]
        theirs = [found.get(name) for name in others]
        lines.append(f"| {' | '.join([*cells, *(_ratio(row, own) for row in theirs)])} |")
        if memory and own.peak_bytes:
            cells = [shape, "memory at the peak", f"{own.peak_bytes / 1e6:.1f} MB", ""]
            lines.append(f"| {' | '.join([*cells, *(_memory(row, own.peak_bytes) for row in theirs)])} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(other: Row | None, own: Row) -> str:
    if other is None or own.ms50 is None:
        return ""
    return "wrong" if other.ms50 is None else f"{other.ms50 / own.ms50:.2f}"


def _memory(other: Row | None, own: int) -> str:
    return "" if other is None or other.peak_bytes is None else f"{other.peak_bytes / own:.3f}"


def _unique(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))
