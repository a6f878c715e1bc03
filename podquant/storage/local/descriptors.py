"""A bounded pool of open files: one that is not in use is closed when another needs its place.

A conversion for a thousand ranks writes a thousand files in turn, an artifact may have tens of thousands; systems
allow a process as few as 1024 descriptors. Knows nothing of what is read or written.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_MOST_OPEN = 512
_SHARE = 4
"""The pool takes at most this part of what the process may open: sockets, pipes and libraries need the rest."""


@dataclass
class _File:
    descriptor: int
    num_users: int = 0


class Descriptors:
    """Descriptors by key, least recently used closed first. Threads may share it."""

    def __init__(self, most_open: int | None = None) -> None:
        """`most_open`: None for what the limits of this process leave room for."""
        self._most_open = most_open
        self._files: OrderedDict[Hashable, _File] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, key: Hashable, path: Path, flags: int) -> Iterator[int]:
        """The descriptor of a file, opened by `flags` (again, if it was closed meanwhile); raises OSError."""
        with self._lock:
            file = self._files.get(key)
            if file is None:
                self._make_room()
                file = self._files[key] = _File(os.open(path, flags | os.O_CLOEXEC))
            self._files.move_to_end(key)
            file.num_users += 1
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.num_users -= 1

    def close(self, key: Hashable) -> None:
        """Close a file that no thread uses, if it is open; raises OSError."""
        with self._lock:
            file = self._files.pop(key, None)
        if file is not None:
            os.close(file.descriptor)

    def close_all(self) -> None:
        """Close every file; raises OSError."""
        with self._lock:
            files, self._files = self._files, OrderedDict()
        for file in files.values():
            os.close(file.descriptor)

    def _make_room(self) -> None:
        most = self._most_open or max(1, min(_MOST_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _SHARE))
        for key in [key for key, file in self._files.items() if not file.num_users]:
            if len(self._files) < most:
                return
            os.close(self._files.pop(key).descriptor)


WRITING = Descriptors()
"""Of all files that this process writes."""
