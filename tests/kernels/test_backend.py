"""Which body runs, and how one is forced."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fibecfed_kernels import WirePlan, _backend, _dispatch, backend, fisher, fisher_diag, use_backend
from fibecfed_kernels.fisher import reference

from .wire_tools import make_flat


def test_cpu_tensors_run_the_extension_and_unknown_devices_the_reference():
    assert backend() == backend("cpu") == "cpp"
    assert backend(torch.device("meta")) == "reference"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no build for this platform")
def test_cuda_tensors_run_triton():
    assert backend("cuda") == backend("cuda:1") == "triton"


def test_a_forced_body_is_the_one_that_runs_and_only_inside_the_block(monkeypatch):
    calls = []
    body = reference.fisher_diag
    monkeypatch.setattr(reference, "fisher_diag", lambda *args: calls.append(1) or body(*args))
    x = torch.ones(1, 2, 3)
    fisher_diag(x, x)
    with use_backend("cpp"):
        fisher_diag(x, x)
    assert calls == []
    with use_backend("reference"):
        assert backend() == "reference"
        fisher_diag(x, x)
    assert calls == [1]
    assert backend() == "cpp"


def test_forcing_ends_with_an_exception_and_nests():
    with pytest.raises(ValueError, match="unknown"), use_backend("reference"), use_backend("cuda"):
        pass
    assert backend() == "cpp"
    with use_backend("reference"):
        with use_backend("cpp"):
            assert backend() == "cpp"
        assert backend() == "reference"
    assert backend() == "cpp"


def test_forcing_in_one_thread_does_not_reach_another():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend()))
        thread.start()
        thread.join()
    assert seen == ["cpp"]


def test_an_unknown_body_is_refused():
    with (
        pytest.raises(ValueError, match=r"'cuda' is unknown, wanted one of reference, cpp, triton"),
        use_backend("cuda"),
    ):
        pass


def test_a_body_that_was_not_built_is_refused(monkeypatch):
    monkeypatch.setattr("fibecfed_kernels._backend.HAS_CPP", False)
    monkeypatch.setattr("fibecfed_kernels._backend.HAS_TRITON", False)
    assert backend("cpu") == backend("cuda") == "reference"
    with pytest.raises(RuntimeError, match=r"fibecfed_kernels\._C was not built"), use_backend("cpp"):
        pass
    with pytest.raises(RuntimeError, match="triton is not installed"), use_backend("triton"):
        pass


def test_messages_are_read_in_the_hosts_memory_whatever_body_is_forced(monkeypatch):
    monkeypatch.setattr(_backend, "interpreting", lambda: False)
    flat = make_flat()
    plan = WirePlan(flat)
    message = plan.pack(flat, round=3, num_samples=1)
    with use_backend("triton"):
        assert plan.read(message).round == 3


def test_a_body_forced_on_tensors_it_cannot_read_is_refused():
    x = torch.ones(1, 2, 3, device="meta")
    with use_backend("cpp"), pytest.raises(RuntimeError, match="'cpp' was forced, but the tensors are on meta"):
        fisher_diag(x, x)


@pytest.mark.parametrize("tracing", [False, True])
def test_triton_is_called_past_the_op_boundary_but_not_while_tracing(monkeypatch, tracing):
    calls = []
    monkeypatch.setattr(_dispatch, "body_for", lambda tensor: "triton")
    monkeypatch.setattr(
        _dispatch, "module_of", lambda name, body: SimpleNamespace(fisher_diag=lambda *args: calls.append((name, body)))
    )
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: tracing)
    x = torch.ones(1, 2, 3)
    found = _dispatch.run("fisher_diag", x, x, x, None, False)
    assert calls == ([] if tracing else [("fisher_diag", "triton")])
    assert (found is not None) == tracing  # the registered op ran, and chose by itself


def test_cpu_pairs_go_to_cpp_without_the_checks_in_python(monkeypatch):
    x, h = torch.randn(2, 3, 5), torch.randn(2, 3, 2)

    def unwanted(*args):
        raise AssertionError("checked in Python")

    wanted = fisher.lora_fisher_diag(x, h, h, x)
    monkeypatch.setattr(fisher, "check_lora", unwanted)
    found = fisher.lora_fisher_diag(x, h, h, x)
    assert torch.equal(found.a.diag, wanted.a.diag)
    with pytest.raises(AssertionError, match="checked in Python"), use_backend("reference"):
        fisher.lora_fisher_diag(x, h, h, x)
    with pytest.raises(AssertionError, match="checked in Python"):
        fisher.lora_fisher_diag(x, h, h, x.double())


def test_an_extension_that_cannot_be_loaded_is_said_and_the_reference_runs(tmp_path):
    """Built for another torch, or cut off: not the same as none."""
    package = tmp_path / "fibecfed_kernels"
    shutil.copytree(Path(_dispatch.__file__).parent, package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    program = (  # an editable install would find the extension elsewhere
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        "import fibecfed_kernels as k; print(k.__file__, k.backend('cpu'))"
    )

    def run():
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True)
        assert found.stdout.decode().split() == [str(package / "__init__.py"), "reference"]
        return found.stderr.decode()

    assert "cannot be loaded" not in run()
    (package / "_C.abi3.so").write_bytes(b"no library")
    assert "the C++ extension fibecfed_kernels._C cannot be loaded" in run()
