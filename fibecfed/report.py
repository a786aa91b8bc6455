"""Runs as tables: a row a round, a summary, and several runs side by side by what a target accuracy cost them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .config import RunConfig, flat_settings
from .phases import Cost
from .plots import write_comparison, write_plots
from .record import RoundRecord, RunRecord, labels

__all__ = [
    "Reached",
    "comparison_table",
    "differences",
    "left_out_table",
    "print_comparison",
    "print_report",
    "reached",
    "rounds_table",
    "seconds_table",
    "summary_table",
    "write_comparison",
    "write_plots",
]

Kind = Literal["global", "personal"]
ABSENT = "–"
ACTIVITIES = ("init", "train", "pack", "aggregate", "evaluate")  # of a round; what else there is, is shown as "other"


@dataclass(frozen=True)
class Reached:
    """What had been spent when a target accuracy was first measured, initialization included.

    seconds: wall time; without_evaluation: the same less the time of testing; modelled_seconds: communication over
    the configured link.
    """

    round: int
    accuracy: float
    seconds: float
    without_evaluation: float
    modelled_seconds: float
    bytes_up: int
    bytes_down: int


def reached(record: RunRecord, target: float, kind: Kind = "global") -> Reached | None:
    """The first evaluated round whose ``kind`` accuracy is at least ``target`` (0 … 1), and its cost; None: never."""
    for index, entry in enumerate(record.rounds):
        accuracy = _accuracy(entry, kind)
        if accuracy is None or accuracy < target:
            continue
        rounds = record.rounds[: index + 1]
        spent: list[Cost] = [*([record.init] if record.init else []), *rounds]
        return Reached(
            round=entry.round,
            accuracy=accuracy,
            seconds=entry.elapsed,
            without_evaluation=entry.elapsed - sum(cost.seconds.get("evaluate", 0.0) for cost in spent),
            modelled_seconds=sum(r.modelled_seconds for r in rounds),
            bytes_up=sum(cost.bytes_up for cost in spent),
            bytes_down=sum(cost.bytes_down for cost in spent),
        )
    return None


def common_target(records: Sequence[RunRecord], kind: Kind = "global") -> float | None:
    """The highest whole percent that every run reached; None where a run has no ``kind`` accuracy."""
    best = [_best(record, kind) for record in records]
    known = [value for value in best if value is not None]
    return math.floor(100 * min(known) + 1e-9) / 100 if known and len(known) == len(best) else None


def rounds_table(record: RunRecord) -> Table:
    """A row a round: loss, accuracies, share of data, layers and rows active, bytes."""
    table = _table(
        "rounds",
        ("round", "loss", "global %", "personal %", "data %", "layers", "rows %", "up MB", "down MB"),
    )
    for entry in record.rounds:
        table.add_row(
            str(entry.round),
            number(entry.loss),
            percent(entry.global_accuracy),
            percent(entry.personal_accuracy),
            percent(entry.data_share, 0),
            str(entry.layers_active),
            percent(entry.rows_active / max(1, entry.rows_total), 0),
            megabytes(entry.bytes_up),
            megabytes(entry.bytes_down),
        )
    return table


def seconds_table(record: RunRecord) -> Table:
    """A row a round: wall seconds by activity, their sum, the run's clock, and the modelled communication."""
    kinds = [kind for kind in ACTIVITIES if any(kind in entry.seconds for entry in record.rounds)]
    rest = any(kind not in kinds for entry in record.rounds for kind in entry.seconds)
    heads = ("round", *kinds, *(["other"] if rest else []), "all", "elapsed", "link")
    table = _table("seconds (link: modelled)", heads)
    for entry in record.rounds:
        total = sum(entry.seconds.values())
        spent = [entry.seconds.get(kind) for kind in kinds]
        if rest:
            spent.append(sum(value for kind, value in entry.seconds.items() if kind not in kinds))
        table.add_row(str(entry.round), *map(seconds, (*spent, total, entry.elapsed, entry.modelled_seconds)))
    return table


def left_out_table(record: RunRecord) -> Table:
    """A row a device and what it is missing in: a round's mean, its accuracies, the adapter; and why."""
    table = _table("devices left out", ("round", "device", "of", "reason"))
    table.columns[-1].justify = "left"
    for entry in record.rounds:
        for what, found in (("mean", entry.refused), ("accuracy", entry.unevaluated)):
            for device, reason in found.items():
                table.add_row(str(entry.round), str(device), what, Text(reason))
    for device, reason in (record.end.refused if record.end else {}).items():
        table.add_row("end", str(device), "adapter", Text(reason))
    return table


def summary_table(record: RunRecord) -> Table:
    """What came out and what it cost, a fact a row."""
    table = Table(title=record.name, box=box.SIMPLE, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for name, value in _facts(record):
        table.add_row(name, escape(value))
    return table


def comparison_table(records: Sequence[RunRecord], target: float, kind: Kind = "global") -> Table:
    """A row a run: its best and last accuracy, and what it had spent when it first reached ``target``."""
    title = f"to {percent(target)} % {kind} accuracy (s − test: without testing; link: modelled)"
    table = _table(title, ("run", "best %", "last %", "round", "s", "s − test", "link", "up MB", "down MB"))
    for record, name in zip(records, labels(records), strict=True):
        spent = reached(record, target, kind)
        cells = [name, percent(_best(record, kind)), percent(_last(record, kind))]
        if spent is None:
            cells += ["never", *[ABSENT] * 5]
        else:
            cells += [
                str(spent.round),
                seconds(spent.seconds),
                seconds(spent.without_evaluation),
                seconds(spent.modelled_seconds),
                megabytes(spent.bytes_up),
                megabytes(spent.bytes_down),
            ]
        table.add_row(*cells)
    return table


def differences(configs: Sequence[RunConfig]) -> dict[str, list[Any]]:
    """The keys in which configurations differ, dotted, with the value of each; name and out aside."""
    flat = [dict(flat_settings(config.model_dump(exclude={"name", "out"}))) for config in configs]
    return {key: [one[key] for one in flat] for key in flat[0] if any(one[key] != flat[0][key] for one in flat)}


def print_report(record: RunRecord, console: Console) -> None:
    """The tables of one run."""
    for note in record.notes:
        console.print(f"note: {note}", style="yellow", markup=False)
    if record.rounds:
        console.print(rounds_table(record))
        console.print(seconds_table(record))
    if (left_out := left_out_table(record)).row_count:
        console.print(left_out)
    console.print(summary_table(record))


def print_comparison(records: Sequence[RunRecord], console: Console, target: float | None = None) -> None:
    """The tables of several runs; ``target`` None: the highest whole percent that all reached."""
    for record in records:
        for note in record.notes:
            console.print(f"note: {note}", style="yellow", markup=False)
    kinds: tuple[Kind, ...] = ("global", "personal")
    for kind in kinds:
        aim = target if target is not None else common_target(records, kind)
        if aim is not None:
            console.print(comparison_table(records, aim, kind))
    table = _table("settings that differ", ("key", *labels(records)))
    for key, values in differences([record.config for record in records]).items():
        table.add_row(key, *map(_setting, values))
    if table.row_count:
        console.print(table)


def _facts(record: RunRecord) -> Iterable[tuple[str, str]]:
    init, end, last = record.init, record.end, record.rounds[-1] if record.rounds else None
    baselines = {"global": init.majority, "personal": init.personal_majority} if init is not None else {}
    for kind in ("global", "personal"):
        last_value, best = percent(_last(record, kind)), percent(_best(record, kind))
        yield f"{kind} accuracy", f"{last_value} %, best {best} %, majority class {percent(baselines.get(kind))} %"
    for name, value in (last.global_metrics if last else {}).items():
        yield name, number(value)
    if init is not None:
        yield "layers that travel", f"{', '.join(map(str, init.gal))}{_why(init.lossless)}"
    if last is not None:
        yield "rows trained", f"{last.rows_active} of {last.rows_total} on a device in round {last.round}"
    spent: Sequence[Cost] = [end] if end else [*([init] if init else []), *record.rounds]
    up, down = sum(cost.bytes_up for cost in spent), sum(cost.bytes_down for cost in spent)
    yield "traffic", f"{megabytes(up)} MB up, {megabytes(down)} MB down"
    link = sum(r.modelled_seconds for r in record.rounds)
    wire = record.config.wire
    yield "link (modelled)", f"{seconds(link)} s at {wire.up_mbit:g}/{wire.down_mbit:g} Mbit/s, {wire.latency_ms:g} ms"
    yield "wall time", _split([cost.seconds for cost in spent])
    if init is not None:
        yield "of it at the start", _split([init.seconds])
    if end is None:
        yield "state", f"interrupted after {len(record.rounds)} of {record.config.train.rounds} rounds"
    elif end.adapter is not None:
        yield "adapter", str(record.path / end.adapter) if record.path else end.adapter


def _split(parts: Sequence[Mapping[str, float]]) -> str:
    """The sum of several clocks, and what it was spent on."""
    kinds = dict.fromkeys(kind for part in parts for kind in part)
    spent = {kind: sum(part.get(kind, 0.0) for part in parts) for kind in kinds}
    return f"{seconds(sum(spent.values()))} s: " + ", ".join(
        f"{kind} {seconds(value)}" for kind, value in spent.items()
    )


def _why(lossless: Mapping[str, Any]) -> str:
    if "found" not in lossless:  # the rule was not asked
        return ""
    if not lossless.get("decides", True):
        return f" (number by gal; the lossless rule would say {lossless['count']})"
    if lossless["found"]:
        return " (number by the lossless rule)"
    return " (the lossless rule found no gap: number by gal.default_share)"


def _accuracy(entry: RoundRecord, kind: str) -> float | None:
    return entry.global_accuracy if kind == "global" else entry.personal_accuracy


def _measured(record: RunRecord, kind: str) -> list[float]:
    return [value for entry in record.rounds if (value := _accuracy(entry, kind)) is not None]


def _best(record: RunRecord, kind: str) -> float | None:
    return max(_measured(record, kind), default=None)


def _last(record: RunRecord, kind: str) -> float | None:
    measured = _measured(record, kind)
    return measured[-1] if measured else None


def _setting(value: Any) -> str:
    return ABSENT if value is None else str(value).lower() if isinstance(value, bool) else escape(str(value))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False, collapse_padding=True)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def percent(value: float | None, digits: int = 1) -> str:
    return ABSENT if value is None else f"{100 * value:.{digits}f}"


def number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def seconds(value: float | None) -> str:
    if value is None:
        return ABSENT
    digits = 0 if value >= 1000 else 1 if value >= 0.1 or value == 0 else 3
    return f"{value:.{digits}f}"


def megabytes(value: int) -> str:
    return f"{value / 1e6:.2f}"
