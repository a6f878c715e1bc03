"""Writes a directory to a bucket so that readers can tell when it is complete. Knows nothing of what files hold.

A bucket has no rename. Objects are written under their final names, each appearing whole and never replacing another;
the last small file is written last, and only if it does not exist: while it is missing, there is no artifact. A lock
object beside the target (`<target>.lock`) keeps a second run out; what a failed run left is recognised by its metadata,
and removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from podquant.errors import StorageError
from podquant.storage.gcs.chunks import CHUNK_BYTES
from podquant.storage.gcs.client import GcsClient, GcsError, shared_client
from podquant.storage.gcs.lock import LEASE_SECONDS, GcsLock
from podquant.storage.gcs.objects import Bucket, ObjectInfo
from podquant.storage.gcs.store import GcsStore, listed, split_uri
from podquant.storage.gcs.upload import GcsWriter
from podquant.storage.names import checked_name
from podquant.storage.store import Store, Writer

TARGET_KEY = "podquant-target"
LAST_KEY = "podquant-last"
_CLEAN_UP_SECONDS = 30.0


def is_folder(info: ObjectInfo) -> bool:
    """Whether an object only marks a folder, as the cloud console and gsutil create them: empty, `path/`."""
    return info.size == 0 and info.name.endswith("/")


@dataclass(frozen=True)
class GcsStaging:
    """A `Staging` below `gs://bucket/path`."""

    uri: str
    chunk_bytes: int = CHUNK_BYTES

    def writer(self, name: str) -> Writer:
        return self.start(name, shared_client(), self.chunk_bytes)

    def start(self, name: str, client: GcsClient, chunk_bytes: int) -> GcsWriter:
        """As `writer`, by a client and in chunks of the caller's choice."""
        bucket, path = split_uri(self.uri)
        metadata = {TARGET_KEY: self.uri}
        where = f"{path}/{checked_name(name, self.uri)}"
        return GcsWriter(Bucket(client, bucket), where, name, metadata=metadata, chunk_bytes=chunk_bytes)


class GcsPublication:
    """A `Publication` below `gs://bucket/path`."""

    def __init__(
        self,
        target_uri: str,
        client: GcsClient | None = None,
        *,
        lease_seconds: float = LEASE_SECONDS,
        chunk_bytes: int = CHUNK_BYTES,
        keep: bool = False,
    ) -> None:
        self.keep = keep
        bucket, path = split_uri(target_uri)
        if not path:
            raise StorageError(f"{target_uri}: cannot fill a whole bucket. Name a directory inside it.")
        self._client = client or shared_client()
        self._bucket = Bucket(self._client, bucket)
        self._path = path
        self._staging = GcsStaging(self.uri, chunk_bytes)
        self._lock = GcsLock(self._bucket, f"{path}.lock", lease_seconds=lease_seconds)
        self._writers: dict[str, GcsWriter] = {}
        self._small: dict[str, GcsWriter] = {}
        self._is_published = False

    @property
    def uri(self) -> str:
        return self._bucket.uri(self._path)

    @property
    def staging(self) -> GcsStaging:
        return self._staging

    def exists(self) -> bool:
        return self._is_taken(self._listed())

    def __enter__(self) -> Self:
        self._lock.acquire(self.uri)
        try:
            left = self._listed()
            if self._is_taken(left):
                raise StorageError(f"{self.uri}: already exists. Remove it, or choose another place.")
            if not self.keep:
                self._client.run(self._bucket.delete_all(left))
        except BaseException:
            self._lock.release()
            raise
        return self

    def staged(self) -> Store | None:
        return GcsStore(self.uri, self._client) if self._listed() else None

    def discard(self, names: Iterable[str]) -> None:
        where = {f"{self._path}/{checked_name(name, self.uri)}" for name in names}
        if where:
            self._client.run(self._bucket.delete_all([info for info in self._listed() if info.name in where]))

    def writer(self, name: str) -> Writer:
        writer = self._new(name, self._staging.chunk_bytes)
        self._writers[name] = writer
        return writer

    def write_small(self, name: str, data: bytes) -> Writer:
        writer = self._new(name, max(1, len(data)))
        writer.write(data)
        self._small[name] = writer
        return writer

    def publish(self) -> None:
        unfinished = [name for name, writer in self._writers.items() if not writer.is_closed]
        if unfinished:
            raise StorageError(f"{self.uri}: still being written: {', '.join(unfinished)}. Close before publishing.")
        if not self._small:
            raise StorageError(f"{self.uri}: no file marks it as complete. Write a small file before publishing.")
        *others, last = self._small.values()
        if self.keep:  # an earlier run may have ended while it published
            mine = [info for info in self._listed() if self._is_mine(info)]
            small = {f"{self._path}/{name}" for name in self._small}
            self._client.run(self._bucket.delete_all([info for info in mine if info.name in small]))
        for writer in others:
            writer.close()
        self._check(self._writers | self._small, missing=last.name)
        last.describe(LAST_KEY, "true")
        self._lock.check()
        last.close()
        try:
            # If this run was suspended for longer than the lease just before, another may be writing here by now.
            self._lock.check()
        except StorageError:
            self._remove(last.name)
            raise
        self._is_published = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_published:
            for writer in (*self._writers.values(), *self._small.values()):
                writer.abandon()
            if not self.keep:
                self._clean_up()
        self._lock.release()

    def _new(self, name: str, chunk_bytes: int) -> GcsWriter:
        if checked_name(name, self.uri) in self._writers | self._small:
            raise StorageError(
                f"{self.uri}/{name}: cannot create: this run is writing it, or has. Choose another name."
            )
        return self._staging.start(name, self._client, chunk_bytes)

    def _listed(self) -> list[ObjectInfo]:
        """What is there, except for folder markers: they are the user's, and harmless."""
        infos = self._client.run(listed(self._bucket, f"{self._path}/"))
        return [info for info in infos if not is_folder(info)]

    def _clean_up(self) -> None:
        # What cannot be removed now, the next run removes or complains about.
        with contextlib.suppress(StorageError):
            mine = [info for info in self._listed() if self._is_mine(info)]
            self._client.run(self._bucket.delete_all(mine, self._client.patience.within(_CLEAN_UP_SECONDS)))

    def _is_mine(self, info: ObjectInfo) -> bool:
        return info.metadata.get(TARGET_KEY) == self.uri

    def _is_taken(self, infos: list[ObjectInfo]) -> bool:
        """Whether there is a complete publication, or anything that a publication to this place has not left."""
        return any(LAST_KEY in info.metadata or info.metadata.get(TARGET_KEY) != self.uri for info in infos)

    def _check(self, writers: dict[str, GcsWriter], *, missing: str) -> None:
        """Compare what is in the bucket with what was written once more: another run may have interfered.

        Other processes have checked themselves what they wrote for this run.
        """
        found = {info.name.removeprefix(f"{self._path}/"): info for info in self._listed()}
        for name, writer in writers.items():
            info = found.pop(name, None)
            if name == missing:
                if info is not None:
                    raise StorageError(
                        f"{self.uri}/{name}: already exists. Another job has written it: let only one job write there."
                    )
                continue
            got = "nothing" if info is None else f"{info.size:,} bytes with CRC32C {info.crc32c or 0:08x}"
            wanted = f"{writer.nbytes:,} bytes with CRC32C {writer.crc32c:08x}"
            if got != wanted:
                raise StorageError(
                    f"{self.uri}/{name}: expected {wanted}, as written, got {got}. Another job writes there: run again."
                )
        strange = sorted(name for name, info in found.items() if not self._is_mine(info))
        if strange:
            raise StorageError(
                f"{self.uri}: holds files that this run did not write: {', '.join(strange)}. "
                "Another job writes there: run again."
            )

    def _remove(self, name: str) -> None:
        with contextlib.suppress(GcsError):
            info = self._client.run(self._bucket.stat(f"{self._path}/{name}"))
            if self._is_mine(info):
                self._client.run(self._bucket.delete(info))
