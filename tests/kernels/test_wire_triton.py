"""The Triton bodies without a GPU: their values in the interpreter, their machine code for three architectures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: there is no Triton body to test")

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90, 100)
POINTERS = ("*fp32", "*i16", "*fp16", "*i8", "*u8")  # to the values, by kind; bfloat16 travels as its bits


def test_triton_bodies_equal_the_reference_bit_for_bit_in_every_dtype() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when triton is imported
    command = [sys.executable, "-m", "tests.kernels.wire_interpreter"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreter process cannot compile kernels")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(architecture: int, tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fibecfed_kernels.wire import triton as body

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel, other, scalars in (
        (body.pack_kernel, "*fp32", {}),
        (body.unpack_kernel, "*fp32", {}),
        (body.accumulate_kernel, "*fp64", {"weight_bits": "i64"}),
    ):
        names = kernel.arg_names
        for kind, pointer in enumerate(POINTERS):
            types = dict(zip(names[:4], ("*i64", pointer, other, "*fp32"), strict=True)) | scalars
            constants = {"KIND": kind, "BLOCK": body.BLOCK}
            signature = {name: types.get(name, "constexpr") for name in names}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(
                source, target=GPUTarget("cuda", architecture, 32), options={"enable_fp_fusion": False}
            )
            binary = tmp_path / f"{names[2]}{kind}.cubin"
            binary.write_bytes(compiled.asm["cubin"])
            usage = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
            assert re.search(r"STACK:0 .*LOCAL:0 ", usage.stdout), f"{kernel.__name__} kind {kind}: {usage.stdout}"
            assert "fma." not in compiled.asm["ptx"], f"{kernel.__name__} kind {kind}: would not round as the CPU does"
