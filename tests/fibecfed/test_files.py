"""Files are replaced whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fibecfed.files import whole_file


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for content in ("first", "second"):
        with whole_file(path) as partial:
            partial.write_text(content)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "state"
    path.write_text("old")

    def fail_halfway() -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_its_bytes_are_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(f"sync {os.fstat(fd).st_size}") or sync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("replace") or replace(a, b))
    with whole_file(tmp_path / "state") as partial:
        partial.write_bytes(bytes(10))
    assert done == ["sync 10", "replace"]
