"""A SuperLink and two SuperNodes, each in processes of their own, on this machine: the run of one process once more."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import tomli_w

from fibecfed.record import read_record
from fibecfed.simulation import run

from ..small_run import config
from .running import adapter, flat, without_scores

pytestmark = pytest.mark.usefixtures("one_thread")
BIN = Path(sys.executable).parent
PATIENCE = 300.0  # seconds; every message to a node starts a process that imports torch and transformers
KEYS = ["partition.devices=2", "train.rounds=1", "gal.selection=first", "gal.spectrum=false", "eval.personal=false"]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def running(log: Path, environment: dict[str, str], *command: str) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]], env=environment, stdout=output, stderr=output, cwd=log.parent
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(port: int) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
        else:
            return


def test_a_run_over_superlink_and_supernodes_is_the_run_in_one_process(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = config(sources, tmp_path / "grid", *KEYS)
    components = {side: f"fibecfed.flower.{side[:6]}_app:app" for side in ("serverapp", "clientapp")}
    described = {"publisher": "tests", "components": components, "config": flat(settings) | {"timeout": PATIENCE}}
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "pyproject.toml").write_text(
        tomli_w.dumps({"project": {"name": "app", "version": "1.0.0"}, "tool": {"flwr": {"app": described}}})
    )
    link, *nodes = free_ports(3)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    superlink = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--port", str(link)]
    with ExitStack() as stack:
        stack.enter_context(running(tmp_path / "link.log", environment, *superlink))
        wait_for(link)
        for place, port in enumerate(nodes):
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--port", str(port)]
            node += ["--node-config", f"partition-id={place}"]
            stack.enter_context(running(tmp_path / f"node{place}.log", environment, *node))
        said = subprocess.run(
            [str(BIN / "flwr"), "run", str(tmp_path / "app"), "--stream"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
    logs = "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert (tmp_path / "grid" / "test" / "adapter").is_dir(), f"{said.stdout}\n{said.stderr}\n{logs}"
    assert "round 1 of 1: loss" in said.stdout
    there, here = read_record(tmp_path / "grid" / "test"), run(config(sources, tmp_path / "here", *KEYS))
    assert without_scores(there) == without_scores(here)
    assert adapter(there) == adapter(here)
