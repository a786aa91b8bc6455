"""Following a run on the terminal: a bar with the current phase, a line for the initialization and for every round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .config import RunConfig
from .record import EndRecord, InitRecord, RoundRecord
from .report import megabytes, number, percent, seconds


class RichObserver:
    """An observer of :func:`fibecfed.run` for a terminal; a context manager, so that the bar always ends.

    Where ``console`` is no terminal the bar is left out and the lines stay. ``path``, ``initialized``
    and ``rounds`` tell afterwards which folder the run has and how far it came.
    """

    def __init__(self, console: Console) -> None:
        self.path: Path | None = None
        self.initialized = False
        self.rounds = 0
        self.total_rounds = 0
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("load data and model", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_start(self, config: RunConfig, total_rounds: int, info: Mapping[str, Any]) -> None:
        self.total_rounds = total_rounds
        self.path = Path(info["path"]) if "path" in info else None
        self._say(", ".join(f"{key} {value}" for key, value in info.items()))

    def on_phase(self, name: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=name, completed=done, total=total)

    def on_init(self, record: InitRecord) -> None:
        self.initialized = True
        gal = ", ".join(map(str, record.gal))
        self._say(
            f"initialization {seconds(sum(record.seconds.values()))} s: layers {gal} travel, "
            f"{record.rows_active} of {record.rows_total} rows are trained, "
            f"majority class {percent(record.majority)} %"
        )

    def on_round(self, record: RoundRecord) -> None:
        self.rounds = record.round
        width = len(str(self.total_rounds))
        self._say(
            f"round {record.round:>{width}}/{self.total_rounds}  loss {number(record.loss)}  "
            f"global {percent(record.global_accuracy):>5} %  personal {percent(record.personal_accuracy):>5} %  "
            f"data {percent(record.data_share, 0):>3} %  {megabytes(record.bytes_up + record.bytes_down)} MB  "
            f"{seconds(sum(record.seconds.values()))} s"
        )
        for device, reason in record.refused.items():
            self._say(f"  device {device} left out: {reason}")
        if len(record.refused) == len(record.devices):
            self._say("  no message was taken: the round is void, the global model is what it was")

    def on_end(self, record: EndRecord) -> None:
        self._progress.stop()

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
