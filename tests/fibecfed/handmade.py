"""Records of runs that never ran, for the tests of record, report and command line."""

from __future__ import annotations

from pathlib import Path

from fibecfed.config import RunConfig, dump_config, load_config
from fibecfed.record import EndRecord, InitRecord, RecordWriter, RoundRecord, RunRecord

SCORES = (0.01, 0.1, 0.5, 0.7, 1.0, 2.0, 40.0, 1000.0)


def init_record(**changes: object) -> InitRecord:
    fields: dict[str, object] = {
        "gal": [1, 3],
        "rows_active": 50,
        "rows_total": 80,
        "seconds": {"load": 1.0, "sensitivity": 3.0},
        "bytes_up": 1000,
        "bytes_down": 0,
        "majority": 0.58,
        "personal_majority": 0.66,
        "sensitivity": {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3},
        "lossless": {"found": False, "count": 2, "devices": {"4": {"eigenvalues": [-0.5, 2.0], "gap": None}}},
        "masks": {0: [10, 20], 1: [20, 20], 2: [10, 20], 3: [20, 20]},
        "devices": [{"size": 3, "labels": [1, 2]}, {"size": 2, "labels": [0, 2]}],
    }
    return InitRecord.from_scores(SCORES, **(fields | changes))


def round_record(number: int, accuracy: float | None, **changes: object) -> RoundRecord:
    fields: dict[str, object] = {
        "round": number,
        "devices": [0, 4],
        "loss": 0.7 / number,
        "data_share": min(1.0, 0.5 + 0.1 * number),
        "layers_active": 2,
        "rows_active": 60,
        "rows_total": 80,
        "bytes_up": 2_000_000,
        "bytes_down": 3_000_000,
        "seconds": {"init": 0.5, "train": 6.0, "pack": 0.25, "aggregate": 0.25, "evaluate": 3.0},
        "modelled_seconds": 1.5,
        "elapsed": 4.0 + 10.0 * number,
        "samples": 40,
        "global_accuracy": accuracy,
        "personal_accuracy": None if accuracy is None else accuracy + 0.05,
        "global_metrics": {} if accuracy is None else {"matthews": accuracy - 0.25},
    }
    return RoundRecord(**(fields | changes))  # type: ignore[arg-type]


def end_record(accuracy: float | None) -> EndRecord:
    return EndRecord.from_scores(
        SCORES,
        global_accuracy=accuracy,
        personal_accuracy=None if accuracy is None else accuracy + 0.05,
        majority=0.58,
        personal_majority=0.66,
        bytes_up=9_000_000,
        bytes_down=9_500_000,
        seconds={"load": 1.0, "train": 18.0, "evaluate": 9.0},
        adapter="adapter",
    )


def run_record(accuracies: tuple[float | None, ...], *overrides: str, end: bool = True) -> RunRecord:
    """A run of one round per accuracy; None: that round was not evaluated."""
    config: RunConfig = load_config(None, [f"train.rounds={len(accuracies)}", *overrides])
    rounds = tuple(round_record(number, accuracy) for number, accuracy in enumerate(accuracies, start=1))
    return RunRecord(config=config, init=init_record(), rounds=rounds, end=end_record(accuracies[-1]) if end else None)


def write_run(folder: Path, record: RunRecord) -> Path:
    """Write a record to the disk as a run does."""
    folder.mkdir()
    (folder / "config.toml").write_text(dump_config(record.config))
    with RecordWriter(folder) as writer:
        for phase in (record.init, *record.rounds, record.end):
            if phase is not None:
                writer.write(phase)
    return folder
