"""The method's rounds over a fleet of devices, wherever they are: initialization, tuning, export, and the record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from . import curriculum
from .client import Device, TrainResult
from .config import dump_config
from .export import export_adapter
from .fleet import Fleet
from .initialization import Choice, choose_layers, neuron_shares
from .phases import Cost
from .record import (
    CONFIG_FILE,
    EndRecord,
    InitRecord,
    Observer,
    RecordWriter,
    RoundRecord,
    RunRecord,
    new_run_dir,
)
from .server import Server, Upload, link_seconds
from .stopwatch import Stopwatch


class Run:
    """One run: what its parts are is the configuration's, who its devices are is the fleet's.

    ``begin`` makes the fleet, and raises the rooms' own errors for what does not fit before anything is written.
    """

    def __init__(self, observer: Observer, begin: Callable[[], Fleet]) -> None:
        self.observer, self.watch = observer, Stopwatch()
        with self.watch.phase("load"):
            self.fleet = begin()
        self.config, self.flat = self.fleet.fed.config, self.fleet.fed.flat
        self.server: Server

    def start(self) -> RunRecord:
        """The whole run; returns its record."""
        path = new_run_dir(Path(self.config.out), self.config.run_name)
        (path / CONFIG_FILE).write_text(dump_config(self.config), encoding="utf-8")
        self._announce(path)
        with RecordWriter(path) as writer:
            init = self._initialize()
            writer.write(init)
            self.observer.on_init(init)
            self._keep(path, 0)
            return self._rounds(path, writer, init, [])

    def _announce(self, path: Path) -> None:
        info = {"path": str(path), "devices": len(self.fleet.sizes), **self.fleet.samples()}
        self.observer.on_start(self.config, self.config.train.rounds, info)

    def _rounds(self, path: Path, writer: RecordWriter, init: InitRecord, rounds: list[RoundRecord]) -> RunRecord:
        for t in range(len(rounds) + 1, self.config.train.rounds + 1):
            rounds.append(self._round(t))
            writer.write(rounds[-1])
            self._keep(path, t)
            self.observer.on_round(rounds[-1])
        end = self._finish(path, init, rounds)
        writer.write(end)
        self._keep_nothing(path)
        record = RunRecord(config=self.config, init=init, rounds=tuple(rounds), end=end, path=path)
        from .report import write_plots  # matplotlib is slow to import and nothing before needs it

        write_plots(record, path)
        self.observer.on_end(end)
        return record

    def _keep(self, path: Path, t: int) -> None:
        """Keep what is needed to go on after round ``t``, where the devices' state is at hand."""

    def _keep_nothing(self, path: Path) -> None:
        """The run has ended."""

    # -- initialization phase ------------------------------------------------------------------------------------

    def _initialize(self) -> InitRecord:
        config, fleet = self.config, self.fleet
        with self.watch.phase("init"):
            choice = choose_layers(fleet, self.watch, self.observer.on_phase)
            if config.neurons.rule == "lossless":
                choice.neuron_shares = neuron_shares(fleet, choice.gal, self.watch, self.observer.on_phase)
            self._divide(choice)
            if not config.curriculum.lazy and fleet.client.needs_scores:
                self._score_all()
        return self._init_record(choice)

    def _divide(self, choice: Choice) -> None:
        """Part the adapter into what the server holds (GAL, head) and what every device keeps (local layers)."""
        self.fleet.divide(choice.gal, choice.neuron_shares)
        self.server = Server(self.flat, choice.gal, self.config.wire, self.config.seed)

    def _score_all(self) -> None:
        """Steps 1, 2 and 5 before round 1, on every device (the paper's way; the lazy way scores at the first
        participation)."""
        total, done = int(self.fleet.sizes.sum()), 0
        with self.watch.phase("score"):
            for samples in self.fleet.score_all():
                done += samples
                self.observer.on_phase("score", done, total)

    def _init_record(self, choice: Choice) -> InitRecord:
        census, nobody = self.fleet.census(), np.zeros(0, dtype=np.int64)
        mask = self.fleet.client.mask(Device(0, nobody, nobody))  # which rows differs by device, how many does not
        spans = {layer: self.flat.rows(layer) for layer in self.flat.layers}
        return InitRecord.from_scores(
            self.fleet.scores(),
            gal=list(choice.gal),
            sensitivity=choice.sensitivity,
            lossless=choice.lossless,
            neuron_shares=choice.neuron_shares,
            rows_active=int(mask.sum()),
            rows_total=self.flat.num_rows,
            masks={layer: [int(mask[rows].sum()), rows.stop - rows.start] for layer, rows in spans.items()},
            seconds=self.watch.take(),
            bytes_up=choice.bytes_up,
            bytes_down=0,
            majority=census.majority,
            personal_majority=census.personal_majority,
            devices=census.devices,
        )

    # -- tuning phase --------------------------------------------------------------------------------------------

    def _round(self, t: int) -> RoundRecord:
        config, fleet, server = self.config, self.fleet, self.server
        drawn = server.draw(t, len(fleet.sizes), config.train.per_round)
        share = self._share(t)
        trained: dict[int, TrainResult] = {}
        bytes_up = 0

        def uploads(broadcast: Tensor) -> Iterator[Upload]:
            nonlocal bytes_up
            for upload in fleet.train(drawn, broadcast, t, share, self.watch, self.observer.on_phase):
                bytes_up += 0 if upload.message is None else upload.message.numel()
                if upload.result is not None:
                    trained[upload.device] = upload.result
                yield upload

        with self.watch.phase("pack"):
            broadcast = server.broadcast(t)
        with self.watch.phase("aggregate"):
            refused = server.average(uploads(broadcast), fleet.sizes, t)
        evaluated = t % config.eval.every == 0 or t == config.train.rounds
        accuracies: dict[str, Any] = {}
        if evaluated:
            with self.watch.phase("evaluate"):
                accuracies = fleet.evaluate(server, self.observer.on_phase)
        results = [result for device, result in trained.items() if device not in refused]
        samples = sum(result.samples for result in results)
        return RoundRecord(
            round=t,
            devices=drawn,
            loss=sum(result.loss * result.samples for result in results) / samples if samples else None,
            data_share=share,
            samples=samples,
            layers_active=len(server.up.layers),
            rows_active=round(float(np.mean([result.rows for result in results]))) if results else 0,
            rows_total=self.flat.num_rows,
            bytes_up=bytes_up,
            bytes_down=len(drawn) * server.down.nbytes,
            seconds=self.watch.take(),
            modelled_seconds=link_seconds(config.wire, server.up.nbytes, server.down.nbytes),
            elapsed=self.watch.elapsed,
            refused=refused,
            **accuracies,
        )

    def _share(self, t: int) -> float:
        chosen = self.config.curriculum
        if not chosen.enabled:
            return 1.0
        return curriculum.pacing(
            chosen.pacing,
            t,
            self.config.train.rounds,
            alpha=chosen.end,
            beta=chosen.start,
            p=chosen.p,
            steps=chosen.steps,
        )

    # -- end -----------------------------------------------------------------------------------------------------

    def _finish(self, path: Path, init: InitRecord, rounds: list[RoundRecord]) -> EndRecord:
        with self.watch.phase("export"):
            exported = export_adapter(self.fleet, self.server, path / "adapter")
        costs: list[Cost] = [init, *rounds]
        seconds: dict[str, float] = {}
        for part in [*(cost.seconds for cost in costs), self.watch.take()]:
            for activity, value in part.items():
                seconds[activity] = seconds.get(activity, 0.0) + value
        return EndRecord.from_scores(
            self.fleet.scores(),
            global_accuracy=rounds[-1].global_accuracy,
            personal_accuracy=rounds[-1].personal_accuracy,
            majority=init.majority,
            personal_majority=init.personal_majority,
            bytes_up=sum(cost.bytes_up for cost in costs) + exported.bytes_up,
            bytes_down=sum(cost.bytes_down for cost in costs),
            seconds=seconds,
            adapter=exported.path.name,
            refused=exported.refused,
        )
