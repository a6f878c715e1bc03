"""Files under a prefix of a Cloud Storage bucket: a `Store`. Reads go straight into the caller's memory.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import threading
from collections.abc import Buffer

from podquant.errors import StorageError
from podquant.storage.failures import refuse_larger
from podquant.storage.gcs.client import GcsClient, shared_client
from podquant.storage.gcs.objects import Bucket, ObjectInfo
from podquant.storage.http_reading import gathered
from podquant.storage.names import checked_name
from podquant.storage.places import SCHEME_GCS

_RANGE_BYTES = 8 << 20
"""Of one request; a larger read is several concurrent ones."""


class GcsStore:
    """The objects below one prefix; a `Store`.

    The place is listed once, when the store is opened (one request per thousand objects), and read as it was then: an
    object replaced or removed since is an error, never a mixture.
    """

    def __init__(self, uri: str, client: GcsClient | None = None) -> None:
        """`uri` (`gs://bucket/prefix`) must hold at least one object, else `StorageError`."""
        bucket, prefix = split_uri(uri)
        client = client or shared_client()
        self._bucket = Bucket(client, bucket)
        self._prefix = f"{prefix}/" if prefix else ""
        self._client: GcsClient | None = client
        self._lock = threading.Lock()
        infos = client.run(listed(self._bucket, self._prefix))
        self._infos = {info.name.removeprefix(self._prefix): info for info in infos if not info.name.endswith("/")}
        if not self._infos:
            raise StorageError(f"{self.uri}: expected a directory with files, found nothing. Check the path.")

    @property
    def uri(self) -> str:
        return self._bucket.uri(self._prefix).rstrip("/")

    def list(self) -> dict[str, int]:
        """As `Store.list`, as of when the store was opened. No request."""
        return {name: self._infos[name].size for name in sorted(self._infos)}

    @property
    def window_bytes(self) -> int:
        return 2 * _RANGE_BYTES

    def size(self, name: str) -> int:
        return self._info(name).size

    def version(self, name: str) -> str:
        info = self._info(name)
        return f"{info.size}-" + (info.generation if info.crc32c is None else f"{info.crc32c:08x}")

    def content_id(self, name: str) -> str | None:
        crc32c = self._info(name).crc32c
        return None if crc32c is None else f"crc32c:{crc32c:08x}"

    def known_crc32c(self, name: str) -> int | None:
        return self._info(name).crc32c

    def read(self, name: str, most: int) -> bytes:
        info = self._info(name)
        refuse_larger(self._bucket.uri(info.name), info.size, most)
        return self._running().run(self._bucket.read(info))

    def read_into(self, name: str, offset: int, buffer: Buffer) -> None:
        info = self._info(name)
        view = memoryview(buffer)
        if view.nbytes == 0:
            return
        view = view.cast("B")
        done = self._running().run(self._read_ranges(info, offset, view))
        if done < len(view):
            raise StorageError(
                f"{self._bucket.uri(info.name)}: the file ends early: wanted {len(view):,} bytes at offset {offset:,}, "
                f"got {done:,}. It is truncated: copy it again."
            )

    def close(self) -> None:
        self._client = None

    async def _read_ranges(self, info: ObjectInfo, offset: int, view: memoryview) -> int:
        starts = range(0, len(view), _RANGE_BYTES)
        parts = (self._bucket.read_into(info, offset + at, view[at : at + _RANGE_BYTES]) for at in starts)
        return sum(await gathered(parts))

    def _info(self, name: str) -> ObjectInfo:
        if checked_name(name, self.uri) not in self._infos:
            raise StorageError(
                f"{self.uri}/{name}: cannot read: there is no such object (HTTP 404). Check the name, or copy it there."
            )
        return self._infos[name]

    def _running(self) -> GcsClient:
        if self._client is None:
            raise StorageError(f"{self.uri}: read after its store was closed.")
        return self._client


async def listed(bucket: Bucket, prefix: str) -> list[ObjectInfo]:
    """Every object whose name starts with `prefix`."""
    return [info async for info in bucket.list(prefix)]


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and prefix, without a slash at its end, of `gs://bucket/prefix`."""
    bucket, _, prefix = uri.removeprefix(SCHEME_GCS).partition("/")
    prefix = prefix.rstrip("/")
    if not uri.startswith(SCHEME_GCS) or not bucket:
        raise StorageError(f"{uri!r} names no bucket. Expected gs://bucket/path.")
    if prefix:
        checked_name(prefix, f"{SCHEME_GCS}{bucket}")
    return bucket, prefix
