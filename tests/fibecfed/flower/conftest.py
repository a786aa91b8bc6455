"""flwr comes with the extras [flower] and [dev]; a machine that has only what the GPU tests need lacks it."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("flwr") else ["test_*.py"]
