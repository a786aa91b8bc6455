"""The wheel works outside the checkout, and both installs work inside it, where `kernels/` lies in the way."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPORTS = (
    "import fibecfed_kernels, fibecfed, transformers; print(fibecfed_kernels.__file__, fibecfed_kernels.backend())"
)
PACK = """
import torch
from safetensors.torch import load
from fibecfed_kernels import Entry, WirePlan, backend

class Adapter:
    entries = (Entry("layer.0.a", (2, 3), 0, 0), Entry("head", (3,), 6, None))
    data = torch.arange(9.0)
    identity = {}

assert backend() == "cpp", backend()
message = WirePlan(Adapter, [0]).pack(Adapter, round=1, num_samples=5)
tensors = load(bytes(message.numpy()))
assert torch.equal(tensors["layer.0.a"], torch.arange(6.0).view(2, 3)), tensors
print("packed", message.numel())
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fibecfed", "kernels", "csrc")
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, source]
    run(*pip, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel alone and sees this one's torch and transformers."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", venv, cwd=venv)
    python = venv / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv).strip()
    paths = [sysconfig.get_path("purelib"), *(p for p in sys.path if p.endswith("site-packages"))]
    # lines of a .pth are added as they are, without the .pth files inside: this checkout's editable install stays out
    (Path(site) / "outer.pth").write_text("\n".join(dict.fromkeys(paths)))
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=venv)
    return python


def test_every_module_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if name.endswith(".py")}
    folders = {"fibecfed": "fibecfed", "kernels": "fibecfed_kernels"}
    wanted = {
        str(installed / path.relative_to(ROOT / folder))
        for folder, installed in ((here, Path(there)) for here, there in folders.items())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert found == wanted


def test_there_is_one_wheel_for_every_python(wheel: Path) -> None:
    assert "-cp311-abi3-" in wheel.name


def test_the_wheel_packs_an_adapter_outside_the_checkout(python: Path, tmp_path: Path) -> None:
    assert "packed" in run(python, "-c", PACK, cwd=tmp_path)
    assert str(ROOT) not in run(python, "-c", IMPORTS, cwd=tmp_path)


def test_the_wheel_works_in_the_repository_root(python: Path) -> None:
    assert run(python, "-c", IMPORTS, cwd=ROOT).startswith(str(python.parent.parent))


def test_the_editable_install_works_in_the_repository_root() -> None:
    found = run(sys.executable, "-c", IMPORTS, cwd=ROOT)
    assert found.split() == [str(ROOT / "kernels" / "__init__.py"), "cpp"]
