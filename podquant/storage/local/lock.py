"""One writer at a time for one place, among the processes that share a file system. Knows nothing of what they write.

The kernel releases the lock (`flock`) when the process that holds it ends, however it ends, so no lock is ever stale.
The lock's file says who holds it.
"""

from __future__ import annotations

import fcntl
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from podquant.errors import StorageError
from podquant.storage.failures import storage_error

_PREFIX = "process "


class Lock:
    """An exclusive lock on `path`, a file of its own that exists while the lock is held."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._is_own = False

    def acquire(self, place: Path) -> None:
        """Take the lock at once or raise `StorageError` naming its holder. `place` is what the lock protects."""
        try:
            while not self._try(place):
                pass
        except StorageError:
            self.release()
            raise
        except OSError as error:
            self.release()
            raise storage_error("lock", self._path, error) from error

    def release(self) -> None:
        """Remove the file, then let go: whoever opened it meanwhile finds it gone and makes a new one."""
        if self._descriptor >= 0:
            if self._is_own:
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def _try(self, place: Path) -> bool:
        """Whether the lock is held now; False if its last holder removed the file after we opened it."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace") or "a process that has just started"
            os.close(descriptor)
            raise StorageError(
                f"{place}: {holder} is writing there. Wait until it ends, stop it, or choose another place."
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        if not _is_at(descriptor, self._path):
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        found = os.pread(descriptor, 4096, 0)
        if found and not found.startswith(_PREFIX.encode()):
            raise StorageError(
                f"{self._path}: podquant needs this name for a lock while it writes {place}, and did not write what is "
                "there. Nothing was touched: move it away, or choose another place"
            )
        self._is_own = True
        started = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{_PREFIX}{os.getpid()} on host {socket.gethostname()} (since {started})".encode(), 0)
        return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
