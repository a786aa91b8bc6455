"""What a run leaves behind: a folder with config.toml and record.jsonl, one line a phase (initialization, rounds, end).

A line is written whole and at once, so an interrupted run keeps every finished round. The lines are strict JSON: a
value that is no number (a loss that diverged) is null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from pydantic import TypeAdapter, ValidationError

from .config import ConfigError, RunConfig, load_config
from .files import whole_file
from .phases import PHASES, EndRecord, Histogram, InitRecord, Phase, RoundRecord

__all__ = [
    "EndRecord",
    "Histogram",
    "InitRecord",
    "Observer",
    "RecordError",
    "RecordWriter",
    "RoundRecord",
    "RunRecord",
    "SilentObserver",
    "check_out",
    "from_json",
    "labels",
    "new_run_dir",
    "read_record",
    "to_json",
    "without_timings",
]

CONFIG_FILE = "config.toml"
RECORD_FILE = "record.jsonl"
_READERS: Mapping[str, TypeAdapter[Phase]] = {name: TypeAdapter(kind) for name, kind in PHASES.items()}


class RecordError(ValueError):
    """A folder that holds no readable record; one line that names the file and what is wrong with it."""


@dataclass(frozen=True)
class RunRecord:
    """A whole run; ``init`` and ``end`` are None where it was interrupted before. ``notes``: flaws of the file."""

    config: RunConfig
    init: InitRecord | None = None
    rounds: tuple[RoundRecord, ...] = ()
    end: EndRecord | None = None
    path: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.name if self.path is not None else self.config.run_name


class Observer(Protocol):
    """Follows a run: progress, tables, logging to anywhere. Called in the thread of the run, in this order."""

    def on_start(self, config: RunConfig, total_rounds: int, info: Mapping[str, Any]) -> None:
        """``info``: "path" (the run's folder), "devices" (their number), "train", "test" (samples), whatever else is
        worth a line."""

    def on_phase(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of a phase; a new name starts a new phase."""

    def on_init(self, record: InitRecord) -> None: ...

    def on_round(self, record: RoundRecord) -> None: ...

    def on_end(self, record: EndRecord) -> None: ...


class SilentObserver:
    """An :class:`Observer` that does nothing; a base for one that looks at a part only."""

    def on_start(self, config: RunConfig, total_rounds: int, info: Mapping[str, Any]) -> None: ...

    def on_phase(self, name: str, done: int, total: int) -> None: ...

    def on_init(self, record: InitRecord) -> None: ...

    def on_round(self, record: RoundRecord) -> None: ...

    def on_end(self, record: EndRecord) -> None: ...


def to_json(record: Phase) -> str:
    """One line of strict JSON: ``{"phase": "init" | "round" | "end", …}``; NaN and infinities become null."""
    phase = next(name for name, kind in PHASES.items() if isinstance(record, kind))
    return json.dumps({"phase": phase, **_plain(asdict(record))}, ensure_ascii=False, allow_nan=False)


def from_json(line: str | bytes) -> Phase:
    """The record of a line of :func:`to_json`. Raises RecordError naming the field."""
    try:
        values = json.loads(line, parse_constant=_refuse_constant)
    except ValueError as error:
        raise RecordError(f"is not JSON: {error}") from None
    phase = values.pop("phase", None) if isinstance(values, dict) else None
    if not isinstance(phase, str) or phase not in PHASES:
        raise RecordError(f'phase: {phase!r}, wanted "init", "round" or "end"')
    try:
        return _READERS[phase].validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecordError(f"{phase}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


class RecordWriter:
    """Appends to ``run_dir``/record.jsonl, each line whole and on the disk before the next.

    The half line of an earlier interruption is cut off first, so that a run can go on in the same folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = open(run_dir / RECORD_FILE, "ab+", buffering=0)  # noqa: SIM115  closed by close()
        self._file.seek(0)
        content = self._file.read()
        if not content.endswith(b"\n"):
            self._file.truncate(content.rfind(b"\n") + 1)

    def write(self, record: Phase) -> None:
        line = memoryview(to_json(record).encode() + b"\n")
        while line:  # a disk that is all but full takes a part
            line = line[self._file.write(line) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_out(out: Path | str) -> None:
    """Refuse, before any work, an ``out`` in which no folder could be made. Raises ConfigError."""
    path = Path(out).expanduser()
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"out = {str(out)!r}: {there} is a file, wanted a folder for the runs")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"out = {str(out)!r}: {there} cannot be written to")


def new_run_dir(out: Path | str, name: str) -> Path:
    """Make the folder ``out``/``name``, or the first free one of name-2, name-3, …: no run overwrites another."""
    parent = Path(out).expanduser()
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def read_record(run_dir: Path | str) -> RunRecord:
    """Read a run's folder. A cut last line behind good ones is left out and said in ``notes``.

    Raises:
        RecordError: no such folder or file, a damaged line before the last, no good line at all, rounds out of order.
        ConfigError: config.toml does not fit.
    """
    path = Path(run_dir)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "no such folder"
        raise RecordError(f"{path}: {problem}, wanted the folder of a run")
    for name in (CONFIG_FILE, RECORD_FILE):
        if not (path / name).is_file():
            raise RecordError(f"{path / name}: no such file, wanted the folder of a run")
    record = RunRecord(config=load_config(path / CONFIG_FILE), path=path)
    lines = (path / RECORD_FILE).read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        where = f"{path / RECORD_FILE} line {number}"
        try:
            entry = from_json(line)
        except RecordError as error:
            if number < len(lines) or number == 1:
                raise RecordError(f"{where}: {error}") from None
            return replace(record, notes=(f"{where} is cut off or damaged and was left out",))
        try:
            record = _extended(record, entry)
        except RecordError as error:
            raise RecordError(f"{where}: {error}") from None
    return record


def rewrite_record(run_dir: Path, lines: Sequence[Phase]) -> None:
    """Make ``lines`` the whole of ``run_dir``/record.jsonl, at once."""
    with whole_file(run_dir / RECORD_FILE) as path:
        path.write_text("".join(to_json(line) + "\n" for line in lines), encoding="utf-8")


def labels(records: Sequence[RunRecord]) -> list[str]:
    """A label for each of several runs: its name, or its folder where two have the same name."""
    names = [record.name for record in records]
    return [
        str(record.path or name) if names.count(name) > 1 else name for record, name in zip(records, names, strict=True)
    ]


def without_timings(record: RunRecord) -> RunRecord:
    """``record`` without wall-clock times, folder and name: equal for two runs of the same configuration and seed."""
    end = record.end
    return RunRecord(
        config=record.config.model_copy(update={"name": None, "out": RunConfig().out}),
        init=record.init and replace(record.init, seconds={}),
        rounds=tuple(replace(entry, seconds={}, elapsed=0.0) for entry in record.rounds),
        end=end and replace(end, seconds={}),
    )


def _extended(record: RunRecord, line: Phase) -> RunRecord:
    if record.end is not None:
        raise RecordError("comes after the end of the run")
    match line:
        case InitRecord():
            if record.init is not None or record.rounds:
                raise RecordError("init: comes twice or after a round")
            return replace(record, init=line)
        case RoundRecord():
            previous = record.rounds[-1].round if record.rounds else 0
            if line.round != previous + 1:
                raise RecordError(f"round: {line.round} comes after {previous}, wanted {previous + 1}")
            return replace(record, rounds=(*record.rounds, line))
        case EndRecord():
            return replace(record, end=line)


def _plain(value: Any) -> Any:
    """Only what JSON has: numbers of numpy and torch become Python's, NaN and infinities None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is not None and not isinstance(value, str | int | float):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
