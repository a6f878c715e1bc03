"""Which files of a directory are read: regular ones that lie inside it, wherever links lead.

A checkpoint comes from strangers: a link in it may point to any file of this machine, and a pipe in the place of a file
would be waited for without end. The one place outside that counts as inside is where Hugging Face's cache keeps what
the links of its snapshots stand for. Knows nothing of what files hold.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from podquant.errors import StorageError
from podquant.storage.failures import refuse_larger, storage_error

READING = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
"""To open what `inside` returns: if a pipe or a link took its place meanwhile, nothing waits and nothing follows."""

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"
_HASH = re.compile("[0-9a-f]{64}")
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def inside(path: Path, root: Path, action: str) -> tuple[Path, os.stat_result]:
    """Where a file below a directory really is, and what is known of it.

    Args:
        path: of the file, in the directory as it was named: this is what messages show.
        root: the directory itself, without links.
        action: what cannot be done where this raises.

    Raises:
        StorageError: it is missing, is no regular file, or a link leads out of the directory.
    """
    try:
        real = Path(os.path.realpath(path, strict=True))
        found = real.stat()
    except OSError as error:
        raise storage_error(action, path, error) from error
    if not real.is_relative_to(root) and not _is_cached(root, real):
        raise StorageError(
            f"{path}: leads out of the directory, to {real}. Only files inside it are read, and those that links of "
            "Hugging Face's cache stand for. Put the file itself there (cp -L), or a hard link"
        )
    refuse_irregular(path, found)
    return real, found


def read_inside(path: Path, root: Path, most: int) -> bytes:
    """All of a file below a directory, which has at most `most` bytes.

    Args:
        path, root: as for `inside`.

    Raises:
        StorageError: as `inside`, or it is larger, or cannot be read.
    """
    real, _ = inside(path, root, "read")
    try:
        with open(os.open(real, READING | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            refuse_irregular(path, found)
            refuse_larger(path, found.st_size, most)
            data = file.read(most + 1)
    except OSError as error:
        raise storage_error("read", path, error) from error
    refuse_larger(path, len(data), most)
    return data


def refuse_irregular(path: Path, found: os.stat_result) -> None:
    """Raise StorageError if what is at `path` is not a regular file."""
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise StorageError(f"{path}: expected a regular file, found {kind}. Remove it, or copy the file again")


def _is_cached(root: Path, real: Path) -> bool:
    """Whether Hugging Face's cache keeps there what a file below `…/REPOSITORY/snapshots/REVISION` stands for.

    That is `REPOSITORY/blobs/ID`, which may be a link to `blobs/HA/HASH` beside all repositories (huggingface_hub 1.x).
    """
    places = (root, *root.parents)
    snapshots = next((above for above in places[1:] if above.name == _SNAPSHOTS), None)
    if snapshots is None:
        return False
    repository = snapshots.parent
    if real.parent == repository / _BLOBS:
        return True
    of_all = repository.parent / _BLOBS
    return _HASH.fullmatch(real.name) is not None and real.parent == of_all / real.name[:2]
