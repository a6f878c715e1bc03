"""Checks that what was read is what was written, by combining checksums of ranges until they cover a file.

A range of an object comes without a checksum, and a process reads only ranges; but the checksums of all ranges, of all
processes, combine to that of the whole file. Knows nothing of what the files hold.
"""

from __future__ import annotations

import threading
from collections.abc import Buffer, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import google_crc32c
import numpy as np

from podquant.storage.crc32c import combine
from podquant.storage.store import Store


@dataclass(frozen=True)
class Run:
    """Bytes `[offset, offset + nbytes)` of a file, as they arrived: their CRC32C.

    Attributes:
        apart: other processes read exactly these bytes too, so this is never joined with its neighbours.
    """

    file: str
    offset: int
    nbytes: int
    crc32c: int
    apart: bool = False

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.offset + self.nbytes


@dataclass(frozen=True)
class Whole:
    """A file as it should be.

    Attributes:
        size: in bytes.
        crc32c: of all of them.
        head: what every process has read of its beginning; None: nothing.
    """

    size: int
    crc32c: int
    head: Run | None = None


class RecordingStore:
    """A `Store` that counts the bytes of its ranged reads, and keeps their checksums for some files.

    Args:
        store: where the bytes are. Closing this closes it.
        records: whether the checksums of a file's ranges are wanted.
    """

    def __init__(self, store: Store, records: Callable[[str], bool]) -> None:
        self._store = store
        self._records = records
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._runs: list[Run] = []
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        """Bytes returned by ranged reads so far."""
        return self._bytes_read

    @property
    def runs(self) -> list[Run]:
        """What was read of the recorded files, neighbours joined."""
        with self._lock:
            self._runs = joined(self._runs)
            return list(self._runs)

    @property
    def uri(self) -> str:
        return self._store.uri

    @property
    def window_bytes(self) -> int:
        return self._store.window_bytes

    def list(self) -> dict[str, int]:
        return self._store.list()

    def size(self, name: str) -> int:
        return self._store.size(name)

    def version(self, name: str) -> str:
        return self._store.version(name)

    def content_id(self, name: str) -> str | None:
        return self._store.content_id(name)

    def known_crc32c(self, name: str) -> int | None:
        return self._store.known_crc32c(name)

    def read(self, name: str, most: int) -> bytes:
        return self._store.read(name, most)

    def read_into(self, name: str, offset: int, buffer: Buffer) -> None:
        view = memoryview(buffer)
        self._store.read_into(name, offset, view)
        wanted = view.nbytes > 0 and self._records(name)
        run = None
        if wanted:
            crc32c = google_crc32c.extend(0, np.frombuffer(view, np.uint8))
            run = Run(name, offset, view.nbytes, crc32c, getattr(self._thread, "apart", False))
        with self._lock:
            self._bytes_read += view.nbytes
            if run is not None:
                self._runs.append(run)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within, what this thread reads is read by other processes too, in exactly the same ranges."""
        self._thread.apart = True
        try:
            yield
        finally:
            self._thread.apart = False

    def close(self) -> None:
        self._store.close()


def joined(runs: Iterable[Run]) -> list[Run]:
    """Runs sorted by file and offset; adjacent ones are merged, repeated ones dropped."""
    groups: list[list[Run]] = []
    distinct = dict.fromkeys(run for run in runs if run.nbytes)
    for run in sorted(distinct, key=lambda run: (run.file, run.offset)):
        last = groups[-1][-1] if groups else None
        if last and not (last.apart or run.apart) and (last.file, last.end) == (run.file, run.offset):
            groups[-1].append(run)
        else:
            groups.append([run])
    return [_join(group) for group in groups]


def _join(group: list[Run]) -> Run:
    if len(group) == 1:
        return group[0]
    crc32c = combine((run.nbytes, run.crc32c) for run in group)
    return Run(group[0].file, group[0].offset, group[-1].end - group[0].offset, crc32c)


def gaps(file: str, whole: Whole, runs: Iterable[Run]) -> list[tuple[int, int]]:
    """Offset and length of the parts of a file that no run covers.

    Args:
        file: its name.
        whole: what it should be.
        runs: of any files.
    """
    found = []
    end = whole.head.end if whole.head else 0
    for run in sorted((run for run in runs if run.file == file), key=lambda run: run.offset):
        if run.offset > end:
            found.append((end, run.offset - end))
        end = max(end, run.end)
    if end < whole.size:
        found.append((end, whole.size - end))
    return found


def adds_up(file: str, whole: Whole, runs: Iterable[Run]) -> bool:
    """Whether the runs cover a file and combine to its checksum; overlaps are ignored.

    Bytes read `apart`, by several processes, must have been the same each time.
    """
    parts = [] if whole.head is None else [whole.head]
    end = whole.head.end if whole.head else 0
    for run in sorted((run for run in runs if run.file == file), key=lambda run: run.offset):
        if run.offset == end:
            parts.append(run)
            end = run.end
        elif run.apart and parts and parts[-1].offset == run.offset and parts[-1] != run:
            return False
    return end == whole.size and combine((run.nbytes, run.crc32c) for run in parts) == whole.crc32c
