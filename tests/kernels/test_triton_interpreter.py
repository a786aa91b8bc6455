"""The Triton bodies of fisher and update without a GPU: their cases in a process of Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fibecfed_kernels import fisher_diag, masked_sgd_, row_layout, use_backend

pytest.importorskip("triton", reason="triton is not installed: there is no Triton body to test")

ROOT = Path(__file__).parents[2]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(
    version("triton").startswith("3.6") and tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4),
    reason="the interpreter of triton 3.6 cannot loop up to a runtime argument with numpy 2.4 or newer",
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py runs the same cases on it")
def test_triton_bodies_pass_their_cases_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when triton is imported
    cases = ["tests/kernels/triton_cases.py", "tests/kernels/triton_update_cases.py"]
    command = [sys.executable, "-m", "pytest", *cases, "--tb=short", "--durations=5"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.skipif(INTERPRETING, reason="in an interpreter process CPU tensors are right")
def test_a_forced_triton_body_refuses_cpu_tensors_outside_the_interpreter() -> None:
    x = torch.ones(1, 2, 3)
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"tensors are on cpu.*TRITON_INTERPRET"):
            fisher_diag(x, x)
        data, steps, mask = torch.ones(0), torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.bool)
        with pytest.raises(RuntimeError, match=r"tensors are on cpu.*TRITON_INTERPRET"):
            masked_sgd_(data, data, None, steps, mask, row_layout([]), lr=0.1)
