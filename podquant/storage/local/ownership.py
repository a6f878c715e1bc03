"""Which directories podquant made itself: each holds a file that says so, and no other is ever removed or renamed.

Knows nothing of what the directories hold.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from podquant.errors import StorageError
from podquant.storage.failures import storage_error

MARKER = ".podquant"
"""The file. It is bookkeeping, not a file of the place: stores do not list it."""

_TEXT = "podquant made this directory, and removes it when it is no longer needed.\n"


def is_own(directory: Path) -> bool:
    """Whether podquant made it. A link is never taken for what it points to."""
    return not directory.is_symlink() and (directory / MARKER).is_file()


def claim(directory: Path) -> None:
    """Make a directory, or take one that is podquant's own or empty.

    Raises:
        StorageError: something else is there; it is left as it is.
    """
    try:
        directory.mkdir(parents=True, exist_ok=not directory.is_symlink())
        if not is_own(directory):
            if any(directory.iterdir()) and not is_own(directory):  # another writer may have marked it just now
                raise _foreign(directory)
            mark(directory)
    except FileExistsError:
        raise _foreign(directory) from None
    except OSError as error:
        raise storage_error("create", directory, error) from error


def refuse_foreign(directory: Path) -> None:
    """Raise StorageError if something is there that podquant did not make; an empty directory is nothing."""
    try:
        if not os.path.lexists(directory) or is_own(directory):
            return
        if directory.is_symlink() or not directory.is_dir() or any(directory.iterdir()):
            raise _foreign(directory)
    except OSError as error:
        raise storage_error("list", directory, error) from error


def mark(directory: Path) -> None:
    """Say that a directory is podquant's own; raises OSError."""
    (directory / MARKER).write_text(_TEXT)


def unmark(directory: Path) -> None:
    """Take that back, for what belongs to the user from now on; raises OSError."""
    (directory / MARKER).unlink(missing_ok=True)


def remove(directory: Path) -> None:
    """Remove podquant's own directory, the marker last, so that what a killed run leaves is known; raises OSError.

    Raises:
        StorageError: it is not podquant's own.
    """
    if not os.path.lexists(directory):
        return
    refuse_foreign(directory)
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name != MARKER:
                os.unlink(entry.path)
    unmark(directory)
    directory.rmdir()


def _foreign(directory: Path) -> StorageError:
    return StorageError(
        f"{directory}: podquant needs this name while it writes, and did not make what is there: it has no {MARKER} "
        "file (versions before 0.2 left none). Nothing was touched: move it away, or choose another place"
    )
