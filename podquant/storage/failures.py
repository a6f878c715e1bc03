"""Turns an operating system error into a `StorageError` with advice. Knows nothing of what the bytes mean."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from podquant.errors import StorageError

_ADVICE = {
    errno.ENOSPC: "Free space there, or choose a place with more.",
    errno.EDQUOT: "The quota of this user or project is used up: free space, raise it, or choose another place.",
    errno.EFBIG: "The file would exceed the largest size allowed here (`ulimit -f`, or the file system's own limit).",
    errno.EACCES: "Give this user access, or choose another place.",
    errno.EPERM: "Give this user access, or choose another place.",
    errno.EROFS: "The file system is mounted read-only: choose another place.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "A part of the path is a file: check the path.",
    errno.EIO: "The device failed: check the disk or the mount.",
}


def storage_error(action: str, path: Path, error: OSError, *, wanted: int | None = None) -> StorageError:
    """The error to raise when `action` ("write", "read", "create" …) on `path` failed with `error`.

    Args:
        wanted: the bytes that the failed call had to move; the message then says how many are free.
    """
    code = errno.errorcode.get(error.errno or 0, "unknown error")
    text = f"{path}: cannot {action}"
    if wanted is not None:
        free = _bytes_free(path)
        text += f" {wanted:,} bytes" + (f" ({free:,} bytes free)" if free is not None else "")
    text += f": {error.strerror} ({code}). "
    return StorageError(text + _ADVICE.get(error.errno or 0, "Check the file system and try again."))


def refuse_larger(place: object, size: int, most: int) -> None:
    """Raise StorageError if a file of `size` bytes, to be read whole, has more than `most`."""
    if size > most:
        raise StorageError(
            f"{place}: has {size:,} bytes; at most {most:,} are read of such a file. Is it what its name says?"
        )


def _bytes_free(path: Path) -> int | None:
    """Bytes an ordinary user may still write where `path` is or would be; None if the system does not say."""
    for place in (path, *path.parents):
        try:
            usage = os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return usage.f_bavail * usage.f_frsize
    return None
