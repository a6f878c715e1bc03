from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from podquant.storage.failures import storage_error


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "Free space"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "Give this user access"),
        (errno.EPERM, "Give this user access"),
        (errno.EROFS, "read-only"),
        (errno.ENOENT, "Check the path"),
        (errno.ENOTDIR, "A part of the path is a file"),
        (errno.EIO, "device failed"),
        (errno.ENOLCK, "try again"),
    ],
)
def test_tells_what_where_why_and_what_to_do(tmp_path: Path, code: int, advice: str) -> None:
    text = str(storage_error("read", tmp_path / "a", OSError(code, os.strerror(code))))
    assert text.startswith(f"{tmp_path}/a: cannot read: {os.strerror(code)} ({errno.errorcode[code]}). ")
    assert advice in text


def test_tells_bytes_wanted_and_free_even_where_the_file_is_not_there_yet(tmp_path: Path) -> None:
    text = str(
        storage_error("write", tmp_path / "no" / "a", OSError(errno.ENOSPC, "No space left on device"), wanted=1234)
    )
    assert re.search(r"cannot write 1,234 bytes \([\d,]+ bytes free\): No space left on device \(ENOSPC\)", text)


def test_leaves_out_the_free_bytes_where_the_system_does_not_tell(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = str(storage_error("write", tmp_path / "file" / "a", OSError(errno.ENOTDIR, "Not a directory"), wanted=1))
    assert "cannot write 1 bytes: Not a directory (ENOTDIR)" in text


def test_an_error_without_a_number_is_still_told(tmp_path: Path) -> None:
    assert "(unknown error)" in str(storage_error("read", tmp_path, OSError("odd")))
