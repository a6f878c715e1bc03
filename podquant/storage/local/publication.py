"""Writes a directory that appears whole or not at all. Knows nothing of what the files hold.

Files go to `<target>.partial`, beside the target and so on its file system; publishing is one rename, and where it
replaces a directory one exchange of names. A lock (`<target>.partial.lock`) keeps a second run out; what a killed run
left behind, the next one removes. Nothing is removed or renamed that podquant did not make, see `ownership`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Buffer, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import google_crc32c
import numpy as np

from podquant.errors import StorageError
from podquant.storage.failures import storage_error
from podquant.storage.local import ownership
from podquant.storage.local.descriptors import WRITING
from podquant.storage.local.exchange import exchange
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

    def __init__(self, target_uri: str, *, keep: bool = False, replaces: Collection[str] | None = None) -> None:
        self.keep = keep
        self._replaces = replaces
        self._target = Path(os.path.realpath(local_path(target_uri)))
        self._partial = Path(f"{self._target}.partial")
        self._replaced = Path(f"{self._target}.replaced")
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
            return any(path.name != ownership.MARKER for path in self._target.iterdir())
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
        is_free = self._replaces is None or not self.exists()
        if self._replaces is not None and not is_free:
            self._refuse_more_than(self._replaces)
        try:
            if is_free:
                if self._target.is_dir():  # it may hold the marker of a run that was killed: a rename needs it empty
                    ownership.unmark(self._target)
                os.rename(self._partial, self._target)
            else:
                self._replace()
            ownership.unmark(self._target)
        except OSError as error:
            raise storage_error(f"rename {self._partial.name} to it", self._target, error) from error
        _sync(self._target.parent)

    def _replace(self) -> None:
        """Put the new directory in the place of the old one, and remove that; raises OSError."""
        ownership.mark(self._target)  # so that it is known for ours under another name
        try:
            old = self._partial if exchange(self._partial, self._target) else self._replaced
            if old is self._replaced:
                ownership.remove(self._replaced)
                os.rename(self._target, self._replaced)
                os.rename(self._partial, self._target)
        except BaseException:
            self._restore()
            with contextlib.suppress(OSError):
                ownership.unmark(self._target)
            raise
        with contextlib.suppress(OSError):  # the new one is in place: what is left of the old, the next run removes
            ownership.remove(old)

    def _restore(self) -> None:
        """Undo half of a replacement that was killed between two renames: the old directory gets its name back."""
        if self.exists() or not ownership.is_own(self._replaced):
            return
        try:
            os.rename(self._replaced, self._target)
            ownership.unmark(self._target)
        except OSError as error:
            raise storage_error(f"rename {self._replaced.name} to it", self._target, error) from error

    def _refuse_more_than(self, names: Collection[str]) -> None:
        more = sorted(set(LocalStore(str(self._target)).list()) - set(names))
        if more:
            raise StorageError(
                f"{self._target}: holds files that are no part of what is to be replaced: {', '.join(more[:5])}"
                f"{' and more' if len(more) > 5 else ''}. Nothing was touched: move them away and run again"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for writer in self._writers:
            writer.abandon()
        # After publish() there is nothing here. What cannot be removed now, the next run removes or complains about.
        if not self.keep:
            with contextlib.suppress(OSError, StorageError):
                ownership.remove(self._partial)
        self._lock.release()

    def _make_partial(self) -> None:
        self._restore()
        if self.exists():
            if self._replaces is None:
                raise StorageError(f"{self._target}: already exists. Remove it, or choose another place.")
            self._refuse_more_than(self._replaces)
        for place in (self._partial, self._replaced):
            ownership.refuse_foreign(place)
        try:
            if self.exists():
                ownership.remove(self._replaced)
            if self.keep:
                shutil.rmtree(self._partial / _UNFINISHED, ignore_errors=True)
            else:
                ownership.remove(self._partial)
        except OSError as error:
            raise storage_error("remove what an earlier run left", self._partial, error) from error
        ownership.claim(self._partial)


class LocalWriter:
    """A `Writer` of one local file, unbuffered: each `write` reaches the operating system before it returns."""

    def __init__(self, path: Path, name: str, final: Path | None = None) -> None:
        """Create the file; `FileExistsError` if it is there. Once closed it is renamed to `final`, if given."""
        self._final = final
        self._path = path
        self._name = name
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        self._is_closed = False
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
        return self._is_closed

    def write(self, buffer: Buffer) -> None:
        if self.is_closed:
            raise StorageError(f"{self._path}: written to after it was closed.")
        data = np.frombuffer(buffer, np.uint8)  # google_crc32c takes arrays, but no memoryview
        done = 0
        try:
            with WRITING.use(self._path, self._path, os.O_WRONLY | os.O_APPEND) as descriptor:
                while done < len(data):
                    chunk = data[done : done + _CHUNK]
                    chunk = chunk[: os.write(descriptor, chunk)]
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
        self._is_closed = True
        try:
            WRITING.close(self._path)  # network file systems tell of a full disk only here
            if self._final is not None:
                os.replace(self._path, self._final)
        except OSError as error:
            raise storage_error("finish writing", self._path, error, wanted=self._nbytes) from error

    def abandon(self) -> None:
        """Let go of a file that will be removed; closed or not, and whatever the disk says to it."""
        if not self.is_closed:
            self._is_closed = True
            with contextlib.suppress(OSError):
                WRITING.close(self._path)
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
