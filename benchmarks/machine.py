"""What a row must say of where it was measured: the machine, the versions, and what the hardware can do at most."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from .timing import Call

CEILING_BYTES = 1 << 27  # of the buffers that bandwidth is measured on: more than the caches hold
MATRIX = {"cpu": 1024, "cuda": 8192}  # side of the square product that the arithmetic rate is measured on
NO_BF16 = ("DEFAULT", "AVX2")  # CPUs on which torch's products of halves are far slower than those of float32
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ceilings:
    """Calls whose times are the machine's limits, timed in the same rounds as everything else.

    copy moves 2·CEILING_BYTES, read CEILING_BYTES; product is one square matrix product in the benchmark's dtype, or in
    float32 where products of halves are slower: anyone may convert.
    """

    calls: dict[str, Call]
    product_flop: int

    def bandwidth(self, milliseconds: dict[str, float]) -> float:
        """Bytes a second: the better of copying (bytes read and written counted) and reading alone."""
        copied = 2 * CEILING_BYTES / milliseconds["copy"]
        return 1e3 * max(copied, CEILING_BYTES / milliseconds["read"])

    def rate(self, milliseconds: dict[str, float]) -> float:
        """Floating-point operations a second."""
        return 1e3 * self.product_flop / milliseconds["product"]


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The limits of ``device`` for products of ``dtype``."""
    source = torch.ones(CEILING_BYTES // 4, device=device)
    target = torch.empty_like(source)
    side = MATRIX[device.type]
    if not has_bf16(device):
        dtype = torch.float32
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)

    def read() -> Tensor:
        return source.sum()

    return Ceilings(
        {"copy": lambda: target.copy_(source), "read": read, "product": lambda: torch.mm(a, b, out=out)}, 2 * side**3
    )


def has_bf16(device: torch.device) -> bool:
    """Whether products of bfloat16 are no slower than of float32."""
    return device.type == "cuda" or torch.backends.cpu.get_cpu_capability() not in NO_BF16


@cache
def facts(device: torch.device) -> dict[str, str]:
    """device, driver, threads, versions and commit, as columns of a row."""
    return {
        "device": _name(device),
        "driver": _driver(device),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fibecfed": _version("fibecfed"),
        "commit": _commit(),
    }


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _driver(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
    return f"{_output(query)}, CUDA {torch.version.cuda}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit, with a + when the code that is measured is not that commit's."""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    changed = _output(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--", "fibecfed", "kernels", "csrc", "benchmarks/*.py"]
    )
    return f"{commit}+" if changed else commit


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
