"""Every Triton kernel, for every row of the launch tables, compiles for real targets without spilling a register.

The bodies run on CPU tensors in a process of their own whose Triton driver names a target and whose launches stop after
compilation: what is compiled is what a launch would compile. cuobjdump then reads the resources off the cubin.
"""

from __future__ import annotations

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


def run_everything() -> None:
    """Call each body once per table row, and once with sizes of 1, which Triton compiles differently."""
    from fibecfed_kernels.fisher import triton as fisher
    from fibecfed_kernels.update import triton as update

    cu_seqlens = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    for (itemsize, rows), _ in _launch.FISHER_TILES.items():
        dtype = DTYPES[itemsize]
        for d_in, d_out in ((4096, rows), (rows, 4096)):
            fisher.fisher_diag(torch.empty(2, 4, d_in, dtype=dtype), torch.empty(2, 4, d_out, dtype=dtype), None, True)
        thin = [torch.empty(8, rank, dtype=dtype) for rank in RANKS[rows]]
        wide = [torch.empty(8, 4096, dtype=dtype) for _ in thin]
        fisher.lora_fisher_diag(wide[0], thin, thin, wide, cu_seqlens, True)
    one = torch.empty(1, 1, 1, dtype=torch.float16)
    fisher.fisher_diag(one, one, None, False)
    fisher.lora_fisher_diag(one, [one], [one], [one], None, False)

    layout = row_layout([Entry("w", (4, 1000), 0, 0)])
    values = [torch.empty(4000) for _ in range(4)]
    steps, mask = torch.zeros(4, dtype=torch.int32), torch.ones(4, dtype=torch.bool)
    update.masked_adamw_(*values, steps, mask, layout, 1e-3, 0.9, 0.999, 1e-8, 0.01)
    update.masked_sgd_(*values[:3], steps, mask, layout, 0.1, 0.9, 0.0, 0.01, True)
    update.masked_sgd_(*values[:3], steps, mask, layout, 0.1, 0.0, 0.0, 0.0, False)


def compile_all(target: int, folder: Path) -> list[dict[str, Any]]:
    """Registers, stack and shared memory of every kernel that run_everything() would launch on ``target``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.jit import JITFunction

    class CompileOnly(DriverBase):
        is_active = get_active_torch_device = get_benchmarker = map_python_to_cpp_type = staticmethod(lambda *_: None)

        def __init__(self) -> None:
            pass

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", target, 32)

    triton.runtime.driver.set_active(CompileOnly())
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = kernel

    JITFunction.run = compile_only
    run_everything()
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = []
    for number, kernel in enumerate(compiled.values()):
        cubin = folder / f"{number}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        text = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
        usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text.stdout)}
        found.append({"kernel": kernel.metadata.name, "shared": kernel.metadata.shared, **usage})
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_and_table_row_compiles_without_spills(target: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    process = subprocess.run(
        [sys.executable, __file__, str(target), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-4000:]
    found = json.loads(process.stdout.splitlines()[-1])
    names = {usage["kernel"] for usage in found}
    assert names == {"fisher_kernel", "finish_kernel", "adamw_kernel", "sgd_kernel"}
    assert sum(usage["kernel"] == "fisher_kernel" for usage in found) >= 3 * len(_launch.FISHER_TILES)
    for usage in found:
        assert usage["STACK"] == usage["LOCAL"] == 0, f"spills: {usage}"
        assert usage["shared"] <= SHARED_MEMORY[target], f"more shared memory than a program may take: {usage}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(compile_all(int(sys.argv[1]), Path(sys.argv[2]))))
