"""What the README says is so: its example runs as written, its table is the recorded run's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.readme import DEMO, ROOT, SEEDS, in_step, tables
from fibecfed import FlatAdapter
from fibecfed.record import read_record
from fibecfed_kernels import WirePlan, aggregate
from tests.fibecfed.tiny import batch, tiny

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_the_tables_are_those_of_the_recorded_runs(name: str) -> None:
    document = (ROOT / name).read_text(encoding="utf-8")
    assert in_step(document, tables()[name]) == document


def test_a_table_without_a_place_or_a_place_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="places for"):
        in_step(README, {**tables()["README.md"], "other": "| a |"})
    with pytest.raises(ValueError, match="places for"):
        in_step(README, {})


@pytest.mark.parametrize("folder", [DEMO, *sorted(SEEDS.iterdir())], ids=lambda folder: folder.name)
def test_the_recorded_runs_reached_their_marks(folder: Path) -> None:
    end = read_record(folder).end
    assert end is not None
    assert end.global_accuracy >= end.majority + 0.12  # type: ignore[operator]
    assert end.personal_accuracy >= end.personal_majority + 0.05  # type: ignore[operator]


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_of_small_messages_runs_as_written() -> None:
    flat = FlatAdapter(tiny("bert"))
    before, trained = flat.data.detach().clone(), torch.zeros(0)

    def train(flat: FlatAdapter) -> None:
        nonlocal trained
        flat.copy_(flat.data.detach() + 0.01 * torch.randn(flat.numel))
        trained = flat.data.detach().clone()

    names: dict[str, object] = {"flat": flat, "torch": torch, "train": train, "WirePlan": WirePlan}
    exec(EXAMPLES[1], names | {"aggregate": aggregate})
    lost = (flat.data.detach() - trained).norm()
    assert 0 < lost < 0.2 * (trained - before).norm()


def test_the_example_of_private_training_runs_as_written() -> None:
    model = tiny("bert")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    names: dict[str, object] = {"model": model, "optimizer": optimizer, "data": range(1000)}
    exec(EXAMPLES[2], names | {"poisson_batches": [batch(), [batch(), batch(seed=4)], []]})
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old) != p.requires_grad


def test_the_example_runs_as_written() -> None:
    example = EXAMPLES[0]
    model = tiny("bert")
    rows = FlatAdapter(tiny("bert")).num_rows
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[::3] = True
    names: dict[str, object] = {"model": model, "batch": batch(), "mask": mask, "data": range(400)}
    first, rest = example.split("plan.scatter_")
    exec(first, names)
    names["other"] = names["message"]
    before = names["flat"].data.detach().clone()  # type: ignore[attr-defined]
    exec("plan.scatter_" + rest, names)
    torch.testing.assert_close(names["flat"].data.detach(), before, rtol=0.01, atol=1e-6)  # type: ignore[attr-defined]
    assert names["fisher"].scores.shape == (5,)  # type: ignore[attr-defined]
