"""How much may be written at a place. Knows nothing of what is written."""

from __future__ import annotations

import os
from pathlib import Path

from podquant.errors import StorageError
from podquant.storage.failures import storage_error
from podquant.storage.local.store import local_path
from podquant.storage.places import SCHEME_GCS


def bytes_free(uri: str) -> int | None:
    """Bytes an ordinary user may still write at `uri`, which need not exist yet; None where there is no limit."""
    if uri.startswith(SCHEME_GCS):
        return None
    path = Path(os.path.realpath(local_path(uri)))
    while not path.is_dir() and path != path.parent:
        path = path.parent
    try:
        usage = os.statvfs(path)
    except OSError as error:
        raise storage_error("read the free space", path, error) from error
    return usage.f_bavail * usage.f_frsize


def require_space(uri: str, nbytes: int, what: str) -> None:
    """Refuse to begin what will not fit.

    Args:
        nbytes: to be written at `uri`.
        what: that takes them, for the message: "the artifact".

    Raises:
        StorageError: there is less room; says how much is missing.
    """
    free = bytes_free(uri)
    if free is not None and free < nbytes:
        raise StorageError(
            f"{uri}: the disk is too small: {what} takes {nbytes:,} bytes and {free:,} are free, {nbytes - free:,} too "
            "few (a quota of yours may leave less). Free space there, or choose a place with more"
        )
