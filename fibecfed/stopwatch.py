"""Wall-clock seconds by phase; an inner phase's time is not counted in the outer one."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """``with watch.phase("train"): …`` adds to ``watch.seconds["train"]``; phases may nest and each second counts
    once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = time.perf_counter()
        self._start = self._since

    @property
    def elapsed(self) -> float:
        """Seconds since the watch was made."""
        return time.perf_counter() - self._start

    def add(self, seconds: float) -> None:
        """Count ``seconds`` that were spent before, by another process."""
        self._start -= seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._book()
        self._running.append(name)
        try:
            yield
        finally:
            self._book()
            self._running.pop()

    def take(self) -> dict[str, float]:
        """The seconds by phase since the last take."""
        self._book()
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken

    def _book(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
