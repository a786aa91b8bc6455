"""run(config): federated fine-tuning over simulated devices, in one process on one model."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from .alike import difference, digests
from .checkpoint import CHECKPOINT_FILE, described, kept_of, load_checkpoint, save_checkpoint
from .config import RunConfig
from .federation import build
from .fleet import LocalFleet
from .initialization import Choice
from .record import Observer, RecordError, RecordWriter, RunRecord, SilentObserver, read_record, rewrite_record
from .rounds import Run


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
    if not isinstance(config, RunConfig):
        raise TypeError(f"config: {type(config).__name__}, wanted a RunConfig (load_config makes one of a file)")
    return _Simulation(config, observer or SilentObserver()).start()


def resume(run_dir: Path | str, *, observer: Observer | None = None) -> RunRecord:
    """Go on with an interrupted :func:`run` after its last finished round, to the same record (timings aside).

    Raises RecordError when the folder holds no run, one that has ended, or one interrupted before its first checkpoint,
    when rounds of its record are gone, and when configuration, model or data are not what they were.
    """
    path = Path(run_dir)
    before = read_record(path)
    if before.end is not None:
        raise RecordError(f"{path}: this run has ended, there is nothing to resume")
    if before.init is None:
        raise RecordError(f"{path}: interrupted before the end of the initialization, wanted a run to go on with")
    kept = kept_of(path, before.config)  # before data and model are loaded
    return _Simulation(before.config, observer or SilentObserver()).go_on(before, path, kept)


class _Simulation(Run):
    """A run whose devices are all here, so that it can be kept after every round and gone on with."""

    fleet: LocalFleet

    def __init__(self, config: RunConfig, observer: Observer) -> None:
        super().__init__(observer, lambda: LocalFleet(build(config)))

    @cached_property
    def _alike(self) -> dict[str, str]:
        return digests(self.fleet.fed, data=True)

    def go_on(self, before: RunRecord, path: Path, kept: dict[str, str]) -> RunRecord:
        assert before.init is not None
        if changed := difference(kept, self._alike, "when the run was interrupted"):
            raise RecordError(f"{path}: {changed}")
        self._announce(path)
        self._divide(Choice(gal=tuple(before.init.gal), neuron_shares=before.init.neuron_shares))
        finished, elapsed = load_checkpoint(path, self.server, self.fleet.store, self.fleet.fed.devices)
        if finished > len(before.rounds):
            raise RecordError(
                f"{path}: its record has {len(before.rounds)} rounds, its checkpoint is of round {finished}: lines of "
                "the record were lost"
            )
        self.watch.add(elapsed)
        rounds = list(before.rounds[:finished])  # a round after the checkpoint is made again, to the same result
        rewrite_record(path, [before.init, *rounds])
        self.observer.on_init(before.init)
        for entry in rounds:
            self.observer.on_round(entry)
        with RecordWriter(path) as writer:
            return self._rounds(path, writer, before.init, rounds)

    def _keep(self, path: Path, t: int) -> None:
        with self.watch.phase("checkpoint"):
            kept = described(self.fleet.fed.config, self._alike)
            save_checkpoint(path, t, self.watch.elapsed, self.server, self.fleet.store, self.fleet.fed.devices, kept)

    def _keep_nothing(self, path: Path) -> None:
        (path / CHECKPOINT_FILE).unlink()
