"""run(config): federated fine-tuning over simulated devices, in one process on one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from . import curriculum
from .checkpoint import CHECKPOINT_FILE, load_checkpoint, save_checkpoint
from .client import Client, Device, TrainResult
from .config import RunConfig, dump_config
from .evaluation import evaluate
from .export import export_adapter
from .federation import Federation, build
from .initialization import Choice, choose_layers, neuron_shares, score_all
from .phases import Cost
from .record import (
    CONFIG_FILE,
    EndRecord,
    InitRecord,
    Observer,
    RecordError,
    RecordWriter,
    RoundRecord,
    RunRecord,
    SilentObserver,
    new_run_dir,
    read_record,
    rewrite_record,
)
from .server import LocalStore, Server, link_seconds, weighted_mean
from .stopwatch import Stopwatch


def run(config: RunConfig, *, observer: Observer | None = None) -> RunRecord:
    """Fine-tune ``config.model`` on ``config.data`` over ``config.partition.devices`` simulated devices with FibecFed.

    Writes ``<out>/<name>/``: config.toml as resolved, record.jsonl (initialization, one line a round, end), adapter/
    (loads with PeftModel.from_pretrained) and plots. Nothing is written before data, model and partition are known to
    fit.

    Returns the record, which is the same for the same configuration on the same machine, timings aside.

    Raises ConfigError, DataError, PartitionError, ModelError (all ValueError) for what does not fit; FloatingPointError
    when training diverges.

    Source: FibecFed (Liu et al., EMNLP 2024, arXiv 2410.00131), steps 1-9.
    """
    return _Simulation(config, observer or SilentObserver()).start()


def resume(run_dir: Path | str, *, observer: Observer | None = None) -> RunRecord:
    """Go on with an interrupted :func:`run` after its last finished round, to the same record (timings aside).

    Raises RecordError when the folder holds no run, one that has ended, or one interrupted before its first checkpoint.
    """
    path = Path(run_dir)
    before = read_record(path)
    if before.end is not None:
        raise RecordError(f"{path}: this run has ended, there is nothing to resume")
    if before.init is None:
        raise RecordError(f"{path}: interrupted before the end of the initialization, wanted a run to go on with")
    return _Simulation(before.config, observer or SilentObserver()).go_on(before, path)


class _Simulation:
    def __init__(self, config: RunConfig, observer: Observer) -> None:
        self.config, self.observer, self.watch = config, observer, Stopwatch()
        with self.watch.phase("load"):
            self.fed: Federation = build(config)
        self.flat = self.fed.flat
        self.client = Client(self.flat, self.fed.train, self.fed.test, config, gal=self.flat.layers)
        self.store: LocalStore
        self.server: Server

    def start(self) -> RunRecord:
        path = new_run_dir(Path(self.config.out), self.config.run_name)
        (path / CONFIG_FILE).write_text(dump_config(self.config), encoding="utf-8")
        self._announce(path)
        with RecordWriter(path) as writer:
            init = self._initialize()
            writer.write(init)
            self.observer.on_init(init)
            self._checkpoint(path, 0)
            return self._rounds(path, writer, init, [])

    def go_on(self, before: RunRecord, path: Path) -> RunRecord:
        assert before.init is not None
        self._announce(path)
        self.client.gal = tuple(before.init.gal)
        self._use_shares(before.init.neuron_shares)
        self._divide()
        finished, elapsed = load_checkpoint(path, self.server, self.store, self.fed.devices)
        self.watch.add(elapsed)
        rounds = list(before.rounds[:finished])  # a round after the checkpoint is made again, to the same result
        rewrite_record(path, [before.init, *rounds])
        self.observer.on_init(before.init)
        for entry in rounds:
            self.observer.on_round(entry)
        with RecordWriter(path) as writer:
            return self._rounds(path, writer, before.init, rounds)

    def _announce(self, path: Path) -> None:
        task = self.fed.task
        info = {"path": str(path), "devices": len(self.fed.devices), "train": len(task.train), "test": len(task.test)}
        self.observer.on_start(self.config, self.config.train.rounds, info)

    def _rounds(self, path: Path, writer: RecordWriter, init: InitRecord, rounds: list[RoundRecord]) -> RunRecord:
        for t in range(len(rounds) + 1, self.config.train.rounds + 1):
            rounds.append(self._round(t))
            writer.write(rounds[-1])
            self._checkpoint(path, t)
            self.observer.on_round(rounds[-1])
        end = self._finish(path, init, rounds)
        writer.write(end)
        (path / CHECKPOINT_FILE).unlink()
        record = RunRecord(config=self.config, init=init, rounds=tuple(rounds), end=end, path=path)
        from .report import write_plots  # matplotlib is slow to import and nothing before needs it

        write_plots(record, path)
        self.observer.on_end(end)
        return record

    def _checkpoint(self, path: Path, t: int) -> None:
        with self.watch.phase("checkpoint"):
            save_checkpoint(path, t, self.watch.elapsed, self.server, self.store, self.fed.devices)

    # -- initialization phase ------------------------------------------------------------------------------------

    def _initialize(self) -> InitRecord:
        config, fed = self.config, self.fed
        with self.watch.phase("init"):
            choice = choose_layers(fed, self.client, self.watch, self.observer.on_phase)
            self.client.gal = choice.gal
            if config.neurons.rule == "lossless":
                choice.neuron_shares = neuron_shares(fed, self.client, self.watch, self.observer.on_phase)
            if not config.curriculum.lazy and self.client.needs_scores:
                score_all(fed, self.client, self.watch, self.observer.on_phase)
        self._use_shares(choice.neuron_shares)
        self._divide()
        return self._init_record(choice)

    def _divide(self) -> None:
        """Part the adapter into what the server holds (GAL, head) and what every device keeps (local layers)."""
        wire = self.config.wire
        self.server = Server(self.flat, self.client.gal, wire, self.config.seed)
        residual = self.server.up.numel if wire.error_feedback else 0
        self.store = LocalStore(self.flat, self.client.gal, len(self.fed.devices), residual)

    def _use_shares(self, shares: Mapping[int, float]) -> None:
        if shares:
            self.client.neuron_share = dict(shares)

    def _init_record(self, choice: Choice) -> InitRecord:
        fed, mask = self.fed, self.client.mask(self.fed.devices[0])
        labels, classes = fed.task.train.labels, len(fed.task.classes)
        spans = {layer: self.flat.rows(layer) for layer in self.flat.layers}
        return InitRecord.from_scores(
            self._scores(),
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
            majority=fed.majority,
            personal_majority=weighted_mean([fed.own_majority(d) for d in fed.devices], fed.sizes),
            devices=[
                {"size": d.size, "labels": np.bincount(labels[d.train], minlength=classes).tolist()}
                for d in fed.devices
            ],
        )

    def _scores(self) -> np.ndarray:
        """The Fisher scores of all samples scored so far."""
        return np.concatenate([np.zeros(0), *(d.scores for d in self.fed.devices if d.scores is not None)])

    # -- tuning phase --------------------------------------------------------------------------------------------

    def _round(self, t: int) -> RoundRecord:
        config, fed, server = self.config, self.fed, self.server
        drawn = [fed.devices[k] for k in server.draw(t, len(fed.devices), config.train.per_round)]
        share = self._share(t)
        results = []

        def uploads(broadcast: Tensor) -> Iterator[Tensor]:
            for device in drawn:
                with self.watch.phase("pack"):
                    server.down.load(broadcast, self.flat, round=t)
                    self.store.load(device.index)
                self._score_if_new(device)
                with self.watch.phase("train"):
                    results.append(self._train(device, t, share, len(drawn)))
                with self.watch.phase("pack"):
                    self.store.save(device.index)
                    residual = self.store.residuals[device.index] if config.wire.error_feedback else None
                    message = server.up.pack(
                        self.flat, round=t, num_samples=device.size, base=server.base, residual=residual
                    )
                yield message

        with self.watch.phase("pack"):
            broadcast = server.broadcast(t)
        with self.watch.phase("aggregate"):
            refused = server.average(uploads(broadcast), [device.size for device in drawn], t)
        evaluated = t % config.eval.every == 0 or t == config.train.rounds
        accuracies: dict[str, Any] = {}
        if evaluated:
            with self.watch.phase("evaluate"):
                accuracies = evaluate(self.fed, self.client, self.server, self.store, self.observer.on_phase)
        samples = sum(result.samples for result in results)
        return RoundRecord(
            round=t,
            devices=[device.index for device in drawn],
            loss=sum(result.loss * result.samples for result in results) / max(1, samples),
            data_share=share,
            samples=samples,
            layers_active=len(self.client.gal),
            rows_active=round(float(np.mean([result.rows for result in results]))),
            rows_total=self.flat.num_rows,
            bytes_up=len(drawn) * server.up.nbytes,
            bytes_down=len(drawn) * server.down.nbytes,
            seconds=self.watch.take(),
            modelled_seconds=link_seconds(config.wire, server.up.nbytes, server.down.nbytes),
            elapsed=self.watch.elapsed,
            refused={drawn[place].index: reason for place, reason in refused.items()},
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

    def _score_if_new(self, device: Device) -> None:
        if device.scores is None and self.client.needs_scores:
            with self.watch.phase("init"):
                done = 0

                def count(samples: int) -> None:
                    nonlocal done
                    done += samples
                    self.observer.on_phase(f"score device {device.index}", done, device.size)

                self.client.score(device, count)

    def _train(self, device: Device, t: int, share: float, drawn: int) -> TrainResult:
        total = self.config.train.epochs * max(1, round(share * device.size))
        done = 0

        def count(samples: int) -> None:
            nonlocal done
            done += samples
            self.observer.on_phase(f"round {t}: device {device.index}", min(done, total), total)

        result = self.client.train(device, t, share, count)
        if not np.isfinite(result.loss):
            raise FloatingPointError(f"round {t}, device {device.index}: the loss is {result.loss}; lower train.lr")
        return result

    # -- end -----------------------------------------------------------------------------------------------------

    def _finish(self, path: Path, init: InitRecord, rounds: list[RoundRecord]) -> EndRecord:
        with self.watch.phase("export"):
            exported = export_adapter(self.fed, self.server, self.store, path / "adapter")
        costs: list[Cost] = [init, *rounds]
        seconds: dict[str, float] = {}
        for part in [*(cost.seconds for cost in costs), self.watch.take()]:
            for activity, value in part.items():
                seconds[activity] = seconds.get(activity, 0.0) + value
        return EndRecord.from_scores(
            self._scores(),
            global_accuracy=rounds[-1].global_accuracy,
            personal_accuracy=rounds[-1].personal_accuracy,
            majority=init.majority,
            personal_majority=init.personal_majority,
            bytes_up=sum(cost.bytes_up for cost in costs) + exported.bytes_up,
            bytes_down=sum(cost.bytes_down for cost in costs),
            seconds=seconds,
            adapter=exported.path.name,
        )
