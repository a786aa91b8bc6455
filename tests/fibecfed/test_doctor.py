"""What the doctor finds on this machine."""

from __future__ import annotations

from io import StringIO

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fibecfed import doctor
from fibecfed.cli import app
from fibecfed_kernels import backend
from fibecfed_kernels._ops import CPU_ONLY, SCHEMAS


def test_the_doctor_names_the_body_that_every_op_runs_here() -> None:
    found = {(body.op, body.device): body for body in doctor.bodies()}
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    assert set(found) == {(op, kind) for op in SCHEMAS for kind in kinds if kind == "cpu" or op not in CPU_ONLY}
    for (op, kind), body in found.items():
        runs = torch._C._dispatch_has_kernel_for_dispatch_key(f"fibecfed::{op}", kind.upper())
        assert body.body == (backend(kind) if runs else "none")
        assert body.why


def test_what_reads_the_hosts_memory_wants_no_body_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kinds: dict[str, set[str]] = {}
    for body in doctor.bodies():
        kinds.setdefault(body.op, set()).add(body.device)
    assert {op for op, of in kinds.items() if of == {"cpu"}} == CPU_ONLY
    assert all(of == {"cpu", "cuda"} for op, of in kinds.items() if op not in CPU_ONLY)


def test_the_doctor_sees_an_op_that_the_built_extension_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    library = torch.library.Library("fibecfed", "FRAGMENT")
    library.define("younger_than_the_extension(Tensor x) -> Tensor")
    monkeypatch.setattr(doctor, "SCHEMAS", {**SCHEMAS, "younger_than_the_extension": ""})
    bodies = {body.op: body for body in doctor.bodies() if body.device == "cpu"}
    assert bodies["younger_than_the_extension"].body == "none"
    assert "build it again" in bodies["younger_than_the_extension"].why
    assert bodies["fisher_diag"].body in ("cpp", "reference")
    assert not doctor.print_doctor(Console(file=StringIO(), width=100))


def test_the_doctor_shows_versions_devices_ops_and_demo_packages() -> None:
    result = CliRunner(env={"COLUMNS": "120", "TERM": "dumb"}).invoke(app, ["doctor"])
    assert result.exit_code == int(any(body.body == "none" for body in doctor.bodies()))
    assert result.stderr == ""
    out = result.stdout
    assert all(word in out for word in (*doctor.PACKAGES, *SCHEMAS, *doctor.DEMO_PACKAGES))
    assert torch.__version__ in out
    assert torch.backends.cpu.get_cpu_capability() in out


def test_the_doctor_says_how_to_get_a_missing_demo_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEMO_PACKAGES", {"no-such-package-here": "the demo's data"})
    console = Console(file=StringIO(), width=100)
    doctor.print_doctor(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "missing" in text
    assert "pip install --no-deps no-such-package-here" in text
