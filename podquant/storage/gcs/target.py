"""Puts a directory that was published to a bucket in the place of another. Knows nothing of what the files hold."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from podquant.errors import StorageError
from podquant.storage.gcs.client import GcsClient, shared_client
from podquant.storage.gcs.lock import GcsLock
from podquant.storage.gcs.objects import Bucket, ObjectInfo
from podquant.storage.gcs.publication import LAST_KEY, TARGET_KEY
from podquant.storage.gcs.store import listed, split_uri


def replace_objects(new_uri: str, old_uri: str, client: GcsClient | None = None) -> None:
    """Put the published `new_uri` in the place of `old_uri`, in the same bucket, and remove what was there.

    The store copies inside itself. The old place loses the file that tells that it is whole first, and gets the new one
    last: killed in between, there is nothing whole at `old_uri`, and all of the new at `new_uri`.
    """
    (name, new), (other, old) = split_uri(new_uri), split_uri(old_uri)
    if name != other:
        raise StorageError(f"{old_uri}: cannot replace by {new_uri}: another bucket. Name a place in the same one.")
    client = client or shared_client()
    bucket = Bucket(client, name)
    lock = GcsLock(bucket, f"{old}.lock")
    lock.acquire(old_uri)
    try:
        client.run(_replace(bucket, f"{new}/", f"{old}/"))
    finally:
        lock.release()


async def _replace(bucket: Bucket, new: str, old: str) -> None:
    infos = await listed(bucket, new)
    last = [info for info in infos if LAST_KEY in info.metadata]
    if len(last) != 1:
        raise StorageError(
            f"{bucket.uri(old)}: cannot replace by {bucket.uri(new)}: expected one file there that was published last, "
            f"found {len(last)}. Nothing was changed: publish there first."
        )

    async def copy(info: ObjectInfo, more: Mapping[str, str]) -> None:
        target = f"{old}{info.name.removeprefix(new)}"
        await bucket.copy(info, target, metadata={TARGET_KEY: bucket.uri(old).rstrip("/"), **more})

    before = await listed(bucket, old)
    mark = f"{old}{last[0].name.removeprefix(new)}"
    await bucket.delete_all(info for info in before if info.name == mark)
    await bucket.delete_all(info for info in before if info.name != mark)
    await asyncio.gather(*(copy(info, {}) for info in infos if info is not last[0]))
    await copy(last[0], {LAST_KEY: "true"})
    await bucket.delete_all(last)
    await bucket.delete_all(info for info in infos if info is not last[0])
