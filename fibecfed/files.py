"""Files that stand at their place whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to. After the block what is there is brought to the disk and moved to
    ``path`` at once; after an error, or when the process or the machine dies meanwhile, ``path`` is what it was."""
    partial = path.with_name(f".{path.name}.part")
    try:
        yield partial
        written = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(written)  # or a machine that loses power may keep the new name and not the new bytes
        finally:
            os.close(written)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
