"""`python -m benchmarks.readme` writes the README table from benchmarks/results/; `--check` tells if it is in step."""

from __future__ import annotations

import sys
from pathlib import Path

from fibecfed.phases import RoundRecord
from fibecfed.record import RunRecord, read_record

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "benchmarks" / "results" / "demo"
BEGIN, END = "<!-- demo: python -m benchmarks.readme -->", "<!-- /demo -->"


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


def in_step(readme: str, record: RunRecord) -> str:
    """``readme`` with the table of ``record`` between its marks. Raises ValueError when a mark is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md: wanted the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{demo_table(record)}\n\n{END}{after}"


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    wanted = in_step(text, read_record(DEMO))
    if "--check" in sys.argv[1:]:
        raise SystemExit(0 if text == wanted else "README.md: its table is not that of benchmarks/results/demo")
    path.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
