"""What stands at a place to write to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from podquant.errors import StorageError
from podquant.storage.target import bytes_free, replace_directory


def test_free_bytes_of_a_place_that_does_not_exist_yet(tmp_path: Path) -> None:
    usage = os.statvfs(tmp_path)
    free = bytes_free(str(tmp_path / "a" / "b"))
    assert free is not None
    assert abs(free - usage.f_bavail * usage.f_frsize) < 1 << 30


def test_free_bytes_are_those_of_the_file_system_it_is_on(tmp_path: Path) -> None:
    assert bytes_free("/proc/podquant") == 0


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("old", "new", "old.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    replace_directory(str(tmp_path / "new"), str(tmp_path / "old"))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["old", "old/new"]


def test_nothing_to_replace(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(StorageError, match=r"old: cannot replace by new: No such file or directory \(ENOENT\)"):
        replace_directory(str(tmp_path / "new"), str(tmp_path / "old"))
    assert (tmp_path / "new").is_dir()
