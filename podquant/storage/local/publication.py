"""Writes a directory that others see whole or not at all. Knows nothing of what the files hold.

Files go to `<target>.partial`, beside the target and so on its file system; publishing is one rename. A lock
(`<target>.partial.lock`) keeps a second run out; what a killed run left behind, the next one removes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Buffer, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import google_crc32c
import numpy as np

from podquant.errors import StorageError
from podquant.storage.failures import storage_error
from podquant.storage.local.lock import Lock
from podquant.storage.local.store import LocalStore, local_path
from podquant.storage.names import checked_name
from podquant.storage.store import Store, Writer

_UNFINISHED = ".unfinished"
_CHUNK = 4 << 20  # bytes written, then checksummed, at a time: few enough to be still in the CPU's cache


@dataclass(frozen=True)
class LocalStaging:
    """A `Staging` in the directory `path`; hosts must share its file system."""

    path: str

    def writer(self, name: str) -> Writer:
        """As `Staging.writer`. Until it is closed the file has a name of its own, so tries do not meet."""
        final = Path(self.path) / checked_name(name, Path(self.path))
        unfinished = Path(self.path) / _UNFINISHED / uuid.uuid4().hex
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            unfinished.parent.mkdir(exist_ok=True)
            return LocalWriter(unfinished, name, final)
        except OSError as error:
            raise storage_error("create", final, error) from error


class LocalPublication:
    """A `Publication` in a local directory.

    Leaving the block without `publish()` (an error, or a change of mind) removes everything that was written. Files may
    be written by several threads at once, each file by one.
    """

    def __init__(self, target_uri: str, *, keep: bool = False) -> None:
        self.keep = keep
        self._target = Path(os.path.realpath(local_path(target_uri)))
        self._partial = Path(f"{self._target}.partial")
        self._lock = Lock(Path(f"{self._target}.partial.lock"))
        self._writers: list[LocalWriter] = []

    @property
    def uri(self) -> str:
        """The target, in full."""
        return str(self._target)

    @property
    def staging(self) -> LocalStaging:
        """As `Publication.staging`."""
        return LocalStaging(str(self._partial))

    def exists(self) -> bool:
        """Whether the target is taken. An empty directory is not: publishing replaces it."""
        try:
            return any(self._target.iterdir())
        except FileNotFoundError:
            return False
        except NotADirectoryError:
            return True
        except OSError as error:
            raise storage_error("list", self._target, error) from error

    def staged(self) -> Store | None:
        """As `Publication.staged`. To be asked before workers start: what they have not closed is listed as well."""
        shown = LocalStore(str(self._partial)) if self._partial.is_dir() else None
        return shown if shown is not None and shown.list() else None

    def discard(self, names: Iterable[str]) -> None:
        """As `Publication.discard`."""
        for path in [self._partial / checked_name(name, self._partial) for name in names]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error("remove", path, error) from error

    def __enter__(self) -> Self:
        """Take the lock, clear away what a killed run left, and make room; `StorageError` if the target is taken."""
        if os.path.ismount(self._target):
            raise StorageError(f"{self._target}: cannot replace a mount point. Name a directory inside it.")
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error("create the directory", self._target.parent, error) from error
        self._lock.acquire(self._target)
        try:
            self._make_partial()
        except BaseException:
            self._lock.release()
            raise
        return self

    def writer(self, name: str) -> Writer:
        """Start a new file; close it before publishing. `name` may hold directories (`shared/a.safetensors`)."""
        path = self._partial / checked_name(name, self._partial)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.keep and name not in {writer.name for writer in self._writers}:
                path.unlink(missing_ok=True)  # an earlier run may have ended while it published
            writer = LocalWriter(path, name)
        except OSError as error:
            raise storage_error("create", path, error) from error
        self._writers.append(writer)
        return writer

    def write_small(self, name: str, data: bytes) -> Writer:
        """Write a whole file and wait until the disk has it; the closed writer tells its size and checksum."""
        writer = self.writer(name)
        writer.write(data)
        writer.close()
        _sync(self._partial / name)
        return writer

    def publish(self) -> None:
        """Rename the whole directory into place.

        The small files and the directories are on disk by then; large files may still be on their way there, and only
        a power cut can tell: their sizes and checksums belong in a small file.
        """
        unfinished = [writer.name for writer in self._writers if not writer.is_closed]
        if unfinished:
            raise StorageError(
                f"{self._partial}: still being written: {', '.join(unfinished)}. Close before publishing."
            )
        shutil.rmtree(self._partial / _UNFINISHED, ignore_errors=True)  # of workers that were killed
        for folder, _, _ in os.walk(self._partial):
            _sync(Path(folder))
        try:
            os.rename(self._partial, self._target)
        except OSError as error:
            raise storage_error(f"rename {self._partial.name} to it", self._target, error) from error
        _sync(self._target.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for writer in self._writers:
            writer.abandon()
        # After publish() there is nothing here. What cannot be removed now, the next run removes or complains about.
        if not self.keep:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._lock.release()

    def _make_partial(self) -> None:
        try:
            left = self._partial / _UNFINISHED if self.keep else self._partial
            if left.exists():
                shutil.rmtree(left)
        except OSError as error:
            raise storage_error("remove what an earlier run left", self._partial, error) from error
        if self.exists():
            raise StorageError(f"{self._target}: already exists. Remove it, or choose another place.")
        try:
            self._partial.mkdir(exist_ok=self.keep)
        except OSError as error:
            raise storage_error("create", self._partial, error) from error


class LocalWriter:
    """A `Writer` of one local file, unbuffered: each `write` reaches the operating system before it returns."""

    def __init__(self, path: Path, name: str, final: Path | None = None) -> None:
        """Create the file; `FileExistsError` if it is there. Once closed it is renamed to `final`, if given."""
        self._final = final
        self._path = path
        self._name = name
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._nbytes = 0
        self._crc32c = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def crc32c(self) -> int:
        return self._crc32c

    @property
    def is_closed(self) -> bool:
        """Whether the file has been ended."""
        return self._descriptor < 0

    def write(self, buffer: Buffer) -> None:
        if self.is_closed:
            raise StorageError(f"{self._path}: written to after it was closed.")
        data = np.frombuffer(buffer, np.uint8)  # google_crc32c takes arrays, but no memoryview
        done = 0
        try:
            while done < len(data):
                chunk = data[done : done + _CHUNK]
                chunk = chunk[: os.write(self._descriptor, chunk)]
                self._crc32c = google_crc32c.extend(self._crc32c, chunk)
                done += len(chunk)
        except OSError as error:
            action = f"write, at offset {self._nbytes + done:,},"
            raise storage_error(action, self._path, error, wanted=len(data) - done) from error
        finally:
            self._nbytes += done

    def close(self) -> None:
        if self.is_closed:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            os.close(descriptor)  # network file systems tell of a full disk only here
            if self._final is not None:
                os.replace(self._path, self._final)
        except OSError as error:
            raise storage_error("finish writing", self._path, error, wanted=self._nbytes) from error

    def abandon(self) -> None:
        """Let go of a file that will be removed; closed or not, and whatever the disk says to it."""
        if not self.is_closed:
            descriptor, self._descriptor = self._descriptor, -1
            with contextlib.suppress(OSError):
                os.close(descriptor)
                if self._final is not None:
                    self._path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a directory."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise storage_error("sync", path, error) from error
