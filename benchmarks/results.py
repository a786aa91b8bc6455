"""One row a measurement, in one CSV file that is only ever appended to."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "results.csv"
SHAPES = RESULTS.with_name("shapes.csv")  # of --shapes all: one mode at many shapes


@dataclass(frozen=True)
class Row:
    """``run``: when the run began (UTC); rows of one run may be compared. error: largest error against float64,
    relative to the largest value; a provider whose error is above ``tolerance`` has no times. floor_ms: the larger of
    bytes / bandwidth and flop / rate, both measured in the same rounds; ``limit`` says which. floor_percent:
    100·floor_ms/ms50. bandwidth_gbps, rate_gflops: what the machine was measured to do at most in those rounds. Empty:
    not known, or not there to be measured.
    """

    run: str
    benchmark: str
    provider: str
    mode: str  # cold, all cold or warm: benchmarks/timing.py
    shape: str
    dtype: str
    ms20: float | None
    ms50: float | None
    ms80: float | None
    bytes: int
    flop: int
    gbps: float | None
    floor_ms: float | None
    floor_percent: float | None
    limit: str
    bandwidth_gbps: float
    rate_gflops: float
    launches: int | None
    host_us: float | None
    peak_bytes: int | None
    error: float | None
    tolerance: float | None
    rounds: int
    device: str
    driver: str
    threads: str
    python: str
    torch: str
    triton: str
    fibecfed: str
    commit: str


COLUMNS = tuple(field.name for field in fields(Row))
_KINDS = {field.name: field.type for field in fields(Row)}


def append(rows: Iterable[Row], path: Path = RESULTS) -> None:
    """Add rows to the file, with a head if it is new. Raises ValueError when the file has other columns."""
    new = not path.exists()
    if not new:
        read(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([_written(value) for value in asdict(row).values()])


def read(path: Path = RESULTS) -> list[Row]:
    """All rows. Raises ValueError, naming the file, when its columns are not those of :class:`Row`."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        if tuple(next(lines, ())) != COLUMNS:
            raise ValueError(f"{path}: its columns are not {', '.join(COLUMNS)}")
        return [Row(**{name: _read(name, text) for name, text in zip(COLUMNS, line, strict=True)}) for line in lines]


def latest(rows: Iterable[Row], benchmark: str) -> list[Row]:
    """The rows of the last run of a benchmark, for each device; what was measured last comes first."""
    of = [row for row in rows if row.benchmark == benchmark]
    last: dict[str, str] = {}
    for row in of:
        last[row.device] = max(last.get(row.device, ""), row.run)
    return sorted((row for row in of if row.run == last[row.device]), key=lambda row: row.run, reverse=True)


def of_mode(rows: Iterable[Row], mode: str) -> list[Row]:
    """The rows of a mode; of a device that was last measured when "cold" meant what now is "all cold", those."""
    known = list(rows)
    measured = {row.device for row in known if row.mode == mode}
    return [row for row in known if row.mode == (mode if row.device in measured or mode != "cold" else "all cold")]


def quantile(values: list[float], share: float) -> float:
    """The value below which ``share`` of ``values`` lie, by the nearest rank."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def _written(value: object) -> object:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else value


def _read(name: str, text: str) -> object:
    kind = str(_KINDS[name])
    if text == "" and "None" in kind:
        return None
    return int(text) if kind.startswith("int") else float(text) if kind.startswith("float") else text
