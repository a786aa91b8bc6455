"""Every Triton kernel, for every row of the launch tables, compiles for real targets without spilling a register.

The bodies run on CPU tensors in a process of their own whose Triton driver names a target and whose launches stop after
compilation: what is compiled is what a launch would compile. cuobjdump then reads the resources off the cubin.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fibecfed_kernels import Entry, _launch, row_layout

TARGETS = (80, 90, 100)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may take
DTYPES = {2: torch.bfloat16, 4: torch.float32}
RANKS = {16: (8,), 32: (8, 8, 8), 64: (64,)}  # one LoRA call for each row of the table
BATCHES = ((2, 4), (9, 1), (1, 16))  # samples, tokens: none of them may need a compilation of its own


def run_everything() -> None:
    """Call each body once per table row, and once with sizes of 1, which Triton compiles differently."""
    from fibecfed_kernels.fisher import triton as fisher
    from fibecfed_kernels.update import triton as update

    for itemsize, rows in _launch.FISHER_TILES:
        for samples, tokens in BATCHES:
            new = functools.partial(torch.empty, samples, tokens, dtype=DTYPES[itemsize])
            fisher.fisher_diag(new(4096), new(rows), None, True)
            fisher.fisher_diag(new(rows), new(4096), None, True)
            fisher.weighted_grad(new(4096), new(rows), torch.empty(samples), None)
            cu_seqlens = torch.arange(samples + 1, dtype=torch.int32) * tokens
            wide = [new(4096).flatten(0, 1) for _ in RANKS[rows]]
            thin = [new(rank).flatten(0, 1) for rank in RANKS[rows]]
            fisher.lora_fisher_diag(wide[0], thin, thin, wide, cu_seqlens, True)
    one = torch.empty(1, 1, 1, dtype=torch.float16)
    fisher.fisher_diag(one, one, None, False)
    fisher.lora_fisher_diag(one, [one], [one], [one], None, False)

    layout = row_layout([Entry("w", (4, 1000), 0, 0)])
    values = [torch.empty(4000) for _ in range(4)]
    steps, mask = torch.zeros(4, dtype=torch.int32), torch.ones(4, dtype=torch.bool)
    grad_scale, lr_scale = torch.empty(()), torch.empty(len(layout), dtype=torch.float64)
    for scales in itertools.product((None, grad_scale), (None, lr_scale)):
        update.masked_adamw_(*values, steps, mask, layout, 1e-3, 0.9, 0.999, 1e-8, 0.01, *scales)
        update.masked_sgd_(*values[:3], steps, mask, layout, 0.1, 0.9, 0.0, 0.01, True, *scales)
        update.masked_sgd_(*values[:3], steps, mask, layout, 0.1, 0.0, 0.0, 0.0, False, *scales)
    update.masked_grad_norm(values[0], mask, layout)
    update.masked_grad_norm(values[0][:1000], mask[:1], layout[:1])


def compile_all(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By target: registers, stack and shared memory of every kernel that run_everything() would launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.jit import JITFunction

    class CompileOnly(DriverBase):
        is_active = get_active_torch_device = get_benchmarker = map_python_to_cpp_type = staticmethod(lambda *_: None)

        def __init__(self, target: int) -> None:
            self.target = target

        def get_current_device(self) -> int:
            return self.target  # compiled kernels are kept by device

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.target, 32)

    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = kernel

    JITFunction.run = compile_only
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found: dict[int, list[dict[str, Any]]] = {}
    for target in TARGETS:
        compiled.clear()
        triton.runtime.driver.set_active(CompileOnly(target))
        run_everything()
        found[target] = []
        for kernel in compiled.values():
            cubin = folder / f"{kernel.hash}.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            text = subprocess.run(
                [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
            )
            usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text.stdout)}
            found[target].append({"kernel": kernel.metadata.name, "shared": kernel.metadata.shared, **usage})
    return found


@pytest.fixture(scope="module")
def usage_by_target(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("cubins")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, __file__, str(folder)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_and_table_row_compiles_without_spills(
    target: int, usage_by_target: dict[str, list[dict[str, Any]]]
) -> None:
    found = usage_by_target[str(target)]
    kernels = {usage["kernel"] for usage in found}
    assert kernels == {"fisher_kernel", "finish_kernel", "adamw_kernel", "sgd_kernel", "squares_kernel", "norm_kernel"}
    for usage in found:
        assert usage["STACK"] == usage["LOCAL"] == 0, f"spills: {usage}"
        assert usage["shared"] <= SHARED_MEMORY[target], f"more shared memory than a program may take: {usage}"


def test_a_new_batch_shape_compiles_nothing(usage_by_target: dict[str, list[dict[str, Any]]]) -> None:
    for found in usage_by_target.values():
        kernels = [usage["kernel"] for usage in found]
        assert kernels.count("fisher_kernel") == 4 * len(_launch.FISHER_TILES) + 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(compile_all(Path(sys.argv[1]))))
