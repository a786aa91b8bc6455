"""The wire's C++ loops against slow obvious code, under ASan and UBSan: fuzz/decoder.cpp over its seeds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fuzz.seeds import numbers

ROOT = Path(__file__).parents[2]
COMPILER = "c++"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that takes files, and gives 0 unless one of them shows something wrong."""
    if not shutil.which(COMPILER):
        pytest.skip("no C++ compiler: if there is an extension, it came in a wheel")
    program = tmp_path_factory.mktemp("decoder") / "decoder"
    sources = [ROOT / "fuzz" / "decoder.cpp", ROOT / "fuzz" / "replay.cpp"]
    subprocess.run(
        [
            COMPILER,
            "-std=c++20",
            "-O1",
            "-g",
            "-ffp-contract=off",
            "-Wall",
            "-Werror",
            *SANITIZERS,
            *sources,
            "-o",
            program,
        ],
        check=True,
    )
    return program


def test_the_loops_do_what_slow_code_does(decoder: Path, tmp_path: Path) -> None:
    paths = []
    for index, data in enumerate(numbers()):
        paths.append(tmp_path / str(index))
        paths[-1].write_bytes(data)
    done = subprocess.run([decoder, *paths], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{len(paths)} inputs\n"), done.stderr
