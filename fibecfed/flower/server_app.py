"""The server of FibecFed over Flower: the same run as in one process, with a grid's nodes as its devices."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..config import RunConfig
from ..phases import EndRecord, InitRecord, RoundRecord
from ..record import SilentObserver, check_out
from ..rounds import Run
from .fleet import FlowerFleet
from .settings import run_config, timeout

log = logging.getLogger("flwr")  # what Flower shows of a run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for the nodes, run, and leave the run's folder where the ServerApp works.

    Raises ConfigError, DataError, ModelError, PartitionError, FleetError (all ValueError) for what does not fit.
    """
    config, seconds = run_config(context.run_config), timeout(context.run_config)
    check_out(config.out)
    Run(_Log(), lambda: FlowerFleet(grid, config, seconds)).start()


class _Log(SilentObserver):
    """Tells a run's phases in Flower's log."""

    def on_start(self, config: RunConfig, total_rounds: int, info: Mapping[str, Any]) -> None:
        self._rounds = total_rounds
        log.info("%(path)s: %(devices)d devices, %(train)d samples to train and %(test)d to test on", info)

    def on_init(self, record: InitRecord) -> None:
        log.info("layers %s travel, %d of %d rows are active", record.gal, record.rows_active, record.rows_total)

    def on_round(self, record: RoundRecord) -> None:
        log.info(
            "round %d of %d: loss %s, accuracy %s, personal %s, %.1f MB, %.0f s",
            record.round,
            self._rounds,
            _shown(record.loss, ".3f"),
            _shown(record.global_accuracy, ".1%"),
            _shown(record.personal_accuracy, ".1%"),
            (record.bytes_up + record.bytes_down) / 1e6,
            record.elapsed,
        )
        for device, reason in record.refused.items():
            log.warning("round %d goes on without device %d: %s", record.round, device, reason)
        for device, reason in record.unevaluated.items():
            log.warning("device %d is not evaluated: %s", device, reason)

    def on_end(self, record: EndRecord) -> None:
        for device, reason in record.refused.items():
            log.warning("the adapter is without device %d's own layers: %s", device, reason)
        log.info("done: %.1f MB in all", (record.bytes_up + record.bytes_down) / 1e6)


def _shown(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)
