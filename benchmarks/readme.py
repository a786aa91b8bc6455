"""`python -m benchmarks.readme` writes the tables of README.md and benchmarks/README.md from benchmarks/results/;
`--check` compares them.

A table stands between ``<!-- NAME: python -m benchmarks.readme -->`` and ``<!-- /NAME -->``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fibecfed.phases import RoundRecord
from fibecfed.record import RunRecord, read_record
from fibecfed.report import differences

from .results import RESULTS, SHAPES, read
from .tables import by_rank, summary, table

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "benchmarks" / "results" / "demo"
SEEDS = ROOT / "benchmarks" / "results" / "seeds"
FEDAVG = ROOT / "benchmarks" / "results" / "fedavg"  # the same seeds without the method
PARTS = ROOT / "benchmarks" / "results" / "parts"  # the same seeds, one setting changed in each folder
BENCHMARKS = {  # name of the place: benchmark, mode, with memory
    "fisher": ("fisher", "cold", False),
    "dtypes": ("fisher: dtypes", "cold", False),
    "packed": ("fisher: packed", "cold", False),
    "scoring": ("scoring", "all cold", True),
    "step": ("training step", "warm", True),
    "clipping": ("clipped sum", "warm", True),
    "update": ("update", "cold", False),
    "pack": ("wire: pack", "cold", False),
    "load": ("wire: load", "cold", False),
    "aggregate": ("wire: aggregate", "cold", False),
}
HEADLINES = (  # what, benchmark, shape, dtype, mode, peers
    ("Fisher scores and diagonal", "fisher", "LLaMA-7B N=8 T=512 r=8", "float32", "cold", ("bmm + square", "Opacus")),
    ("a data set scored", "scoring", "MiniLM r=8, 256 film reviews", "float32", "all cold", ("batch-of-1 loop",)),
    ("the clipped sum of a batch", "clipped sum", "MiniLM r=8, N=32", "float32", "warm", (
        "Opacus, fast gradient clipping", "Opacus, hooks")),
    ("AdamW, all rows", "update", "RoBERTa-large r=8, 100% of the rows", "float32", "cold", ("torch fused",)),
    ("AdamW, a quarter of the rows", "update", "LLaMA-7B r=16, 25% of the rows", "float32", "cold", (
        "grad.mul_(mask) + torch fused (does not freeze)",)),
    ("a message packed, checksums included", "wire: pack", "LLaMA-7B r=8, all layers", "float32", "cold", (
        "memcpy, no message", "safetensors", "Flower, ArrayRecord")),
    ("a message loaded, all checks", "wire: load", "LLaMA-7B r=8, all layers", "float32", "cold", (
        "memcpy, no message", "safetensors", "Flower, ArrayRecord")),
    ("the mean of ten messages", "wire: aggregate", "LLaMA-7B r=8, 10 devices", "float32", "cold", (
        "safetensors.torch.load + add_ by tensor", "Flower, pull + FedAvg")),
)  # fmt: skip
FROM_MEMORY = tuple(  # what a call costs when the processor holds nothing of it, at small shapes
    (what, benchmark, shape, "float32", "all cold", peers)
    for what, benchmark, shape, peers in (
        ("Fisher scores and diagonal", "fisher", "MiniLM N=1 T=32 r=16", ("bmm + square", "Opacus")),
        ("Fisher scores and diagonal", "fisher", "RoBERTa-large N=8 T=128 r=8", ("bmm + square", "Opacus")),
        ("AdamW, all rows", "update", "RoBERTa-large r=8, 100% of the rows", ("torch fused",)),
        ("AdamW, a tenth of the rows", "update", "RoBERTa-large r=8, 10% of the rows", (
            "grad.mul_(mask) + torch fused (does not freeze)",)),
        ("a message packed", "wire: pack", "RoBERTa-large r=8, half of the layers", (
            "memcpy, no message", "safetensors")),
        ("a message loaded", "wire: load", "RoBERTa-large r=8, half of the layers", (
            "memcpy, no message", "safetensors")),
    )
)  # fmt: skip
MARKED = re.compile(
    r"<!-- (?P<name>[a-z]+): python -m benchmarks\.readme -->\n(?P<old>.*?)<!-- /(?P=name) -->", re.DOTALL
)


def demo_table(record: RunRecord) -> str:
    """The demo's rounds, every other one, as a Markdown table."""
    init, end = record.init, record.end
    if init is None or end is None or not record.rounds:
        raise ValueError(f"{record.path}: not a whole run")
    lines = [
        "| round | data used | layers, rows | loss | global accuracy | personal accuracy | MB moved | seconds |",
        "|---|---|---|---|---|---|---|---|",
        f"| none: majority class | | | | {_percent(init.majority)} | {_percent(init.personal_majority)} | | |",
    ]
    moved = init.bytes_up + init.bytes_down
    for entry in record.rounds:
        moved += entry.bytes_up + entry.bytes_down
        if entry.round % 2 == 0 or entry is record.rounds[-1]:
            lines.append(_row(entry, moved))
    return "\n".join(lines)


def seeds_table(runs: Mapping[str, Sequence[RunRecord]]) -> str:
    """The last round of several runs that differ by their seed, for each way to train, beside always naming the
    majority class; what moved, and how many samples were trained on."""
    lines = [
        "| | seed | global accuracy | majority class | personal accuracy | own majority | MB moved | samples seen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, records in runs.items():
        for record in records:
            end = record.end
            if end is None:
                raise ValueError(f"{record.path}: not a whole run")
            shares = (end.global_accuracy, end.majority, end.personal_accuracy, end.personal_majority)
            moved = (end.bytes_up + end.bytes_down) / 1e6
            samples = sum(entry.samples or 0 for entry in record.rounds)
            cells = [name, str(record.config.seed), *map(_percent, shares), f"{moved:.1f}", f"{samples:,}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parts_table(whole: Sequence[RunRecord], changed: Iterable[Sequence[RunRecord]]) -> str:
    """The last round of runs with one seed each, and of those with the same seeds and one setting changed: accuracies
    of every seed, what moved, and how many samples were trained on, on average."""
    seeds = [record.config.seed for record in whole]
    lines = [
        f"| setting | global accuracy, seeds {', '.join(map(str, seeds))} | mean | personal accuracy | mean "
        "| MB moved | samples seen |",
        "|---|---|---|---|---|---|---|",
    ]
    for records in (whole, *changed):
        settings = {
            f"`{key}={str(other).lower()}`"
            for base, record in zip(whole, records, strict=True)
            for key, (_, other) in differences([base.config, record.config]).items()
        }
        ends = [record.end for record in records if record.end is not None]
        if [record.config.seed for record in records] != seeds or len(ends) < len(seeds):
            raise ValueError(f"{records[0].path}: not whole runs of seeds {seeds}")
        cells = [", ".join(sorted(settings)) or "the demo's"]
        for shares in ([end.global_accuracy for end in ends], [end.personal_accuracy for end in ends]):
            cells += [" ".join(f"{100 * (share or 0):.1f}" for share in shares), _percent(_mean(shares))]
        cells.append(f"{_mean([end.bytes_up + end.bytes_down for end in ends]) / 1e6:.1f}")
        cells.append(f"{_mean([sum(entry.samples or 0 for entry in record.rounds) for record in records]):,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> float:
    return sum(value or 0 for value in values) / len(values)


def _row(entry: RoundRecord, moved: int) -> str:
    cells = [
        str(entry.round),
        f"{100 * entry.data_share:.0f} %",
        f"{entry.layers_active}, {entry.rows_active} of {entry.rows_total}",
        "–" if entry.loss is None else f"{entry.loss:.3f}",
        _percent(entry.global_accuracy),
        _percent(entry.personal_accuracy),
        f"{moved / 1e6:.1f}",
        f"{entry.elapsed:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def tables() -> dict[str, dict[str, str]]:
    """By document: every table by the name of its place, from what is recorded."""
    seeds = {
        name: [read_record(folder) for folder in sorted(runs.iterdir())]
        for name, runs in (("FibecFed", SEEDS), ("FedAvg", FEDAVG))
    }
    parts = [[read_record(run) for run in sorted(folder.iterdir())] for folder in sorted(PARTS.iterdir())]
    rows = read(RESULTS)
    return {
        "README.md": {
            "demo": demo_table(read_record(DEMO)),
            "seeds": seeds_table(seeds),
            "speed": summary(rows, HEADLINES),
        },
        "benchmarks/README.md": {
            name: table(rows, benchmark, mode, memory) for name, (benchmark, mode, memory) in BENCHMARKS.items()
        }
        | {"parts": parts_table(seeds["FibecFed"], parts)}
        | {"memory": summary(rows, FROM_MEMORY), "shapes": by_rank(read(SHAPES), "fisher", "bmm + square")},
    }


def in_step(document: str, found: Mapping[str, str]) -> str:
    """A document with each table in its place. Raises ValueError for a table without a place or a place without
    one."""
    places = {match["name"] for match in MARKED.finditer(document)}
    if places != found.keys():
        raise ValueError(f"places for {sorted(places)}, wanted places for {sorted(found)}")
    return MARKED.sub(
        lambda m: f"<!-- {m['name']}: python -m benchmarks.readme -->\n\n{found[m['name']]}\n\n<!-- /{m['name']} -->",
        document,
    )


def main() -> None:
    for name, found in tables().items():
        text = (ROOT / name).read_text(encoding="utf-8")
        wanted = in_step(text, found)
        if "--check" not in sys.argv[1:]:
            (ROOT / name).write_text(wanted, encoding="utf-8")
        elif text != wanted:
            raise SystemExit(f"{name}: its tables are not those of benchmarks/results")


if __name__ == "__main__":
    main()
