"""What stands at a place to write to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from podquant.errors import StorageError
from podquant.storage.space import bytes_free, require_space


def test_free_bytes_of_a_place_that_does_not_exist_yet(tmp_path: Path) -> None:
    usage = os.statvfs(tmp_path)
    free = bytes_free(str(tmp_path / "a" / "b"))
    assert free is not None
    assert abs(free - usage.f_bavail * usage.f_frsize) < 1 << 30


def test_free_bytes_are_those_of_the_file_system_it_is_on(tmp_path: Path) -> None:
    assert bytes_free("/proc/podquant") == 0


def test_what_will_not_fit_is_refused_with_figures() -> None:
    with pytest.raises(StorageError, match=r"^/proc/podquant: the disk is too small: the copy takes 1,234 bytes and 0"):
        require_space("/proc/podquant", 1234, "the copy")
    require_space("/proc/podquant", 0, "nothing")
