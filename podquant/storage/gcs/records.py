"""Small documents under a prefix of a bucket: `Records`. Knows nothing of what they say."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import google_crc32c

from podquant.errors import StorageError
from podquant.foreign import MOST_JSON_BYTES
from podquant.storage.failures import refuse_larger
from podquant.storage.gcs.client import GcsError, shared_client
from podquant.storage.gcs.objects import WRITE_KEY, Bucket, ObjectInfo
from podquant.storage.gcs.store import listed, split_uri
from podquant.storage.names import checked_name


@dataclass(frozen=True)
class GcsRecords:
    """`Records` below `uri`, `gs://bucket/path`."""

    uri: str

    def write(self, name: str, data: bytes) -> None:
        """As `Records.write`. Several that write the same are all right."""
        bucket, prefix = self._place()
        bucket.client.run(_write(bucket, prefix + checked_name(name, self.uri), data))

    def read(self) -> dict[str, bytes]:
        """As `Records.read`: a listing, and a request a document."""
        bucket, prefix = self._place()

        async def read_all() -> dict[str, bytes]:
            infos = await _own(bucket, prefix)
            for info in infos:
                refuse_larger(bucket.uri(info.name), info.size, MOST_JSON_BYTES)
            data = await asyncio.gather(*(bucket.read(info) for info in infos))
            return {info.name.removeprefix(prefix): each for info, each in zip(infos, data, strict=True)}

        return bucket.client.run(read_all())

    def remove(self, names: list[str]) -> None:
        """As `Records.remove`."""
        bucket, prefix = self._place()
        wanted = {prefix + checked_name(name, self.uri) for name in names}
        if wanted:
            bucket.client.run(self._remove(bucket, prefix, wanted))

    def clear(self) -> None:
        """As `Records.clear`."""
        bucket, prefix = self._place()
        bucket.client.run(self._remove(bucket, prefix, None))

    def _place(self) -> tuple[Bucket, str]:
        name, prefix = split_uri(self.uri)
        return Bucket(shared_client(), name), f"{prefix}/"

    async def _remove(self, bucket: Bucket, prefix: str, wanted: set[str] | None) -> None:
        infos = await _own(bucket, prefix)
        await bucket.delete_all(info for info in infos if wanted is None or info.name in wanted)


async def _own(bucket: Bucket, prefix: str) -> list[ObjectInfo]:
    """What is there; an error if podquant has not written all of it."""
    infos = [info for info in await listed(bucket, prefix) if not info.name.endswith("/")]
    foreign = [info.name for info in infos if WRITE_KEY not in info.metadata]
    if foreign:
        raise StorageError(
            f"{bucket.uri(foreign[0])}: podquant keeps notes under {bucket.uri(prefix)} while it writes, and did not "
            "write this. Nothing was touched: move it away, or choose another place"
        )
    return infos


async def _write(bucket: Bucket, name: str, data: bytes) -> None:
    generation = "0"
    while True:
        try:
            await bucket.put(name, data, generation=generation)
            return
        except GcsError as error:
            if error.status != 412:
                raise
        try:
            info = await bucket.stat(name)
        except GcsError as error:
            if error.status != 404:
                raise
            generation = "0"
            continue
        if (info.size, info.crc32c) == (len(data), google_crc32c.value(data)):
            return
        generation = info.generation
