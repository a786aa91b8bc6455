"""The bodies that can be tested here, by name; C++ is skipped, with the reason, where the extension was not built."""

from __future__ import annotations

import pytest

from fibecfed_kernels._backend import HAS_CPP

needs_cpp = pytest.mark.skipif(not HAS_CPP, reason="the C++ extension was not built: there is one body only")
BODIES = ("reference", "cpp")
PARAMS = ("reference", pytest.param("cpp", marks=needs_cpp))
bodies = pytest.mark.parametrize("body", PARAMS)
