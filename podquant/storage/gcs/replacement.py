"""Puts a directory that was published to a bucket in the place of another. Knows nothing of what the files hold."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

from podquant.errors import StorageError
from podquant.storage.gcs.client import GcsClient, shared_client
from podquant.storage.gcs.lock import GcsLock
from podquant.storage.gcs.objects import Bucket, ObjectInfo
from podquant.storage.gcs.publication import LAST_KEY, TARGET_KEY, GcsPublication, is_folder
from podquant.storage.gcs.store import listed, split_uri

NEW = ".new"
"""What a publication that replaces another is called until it does."""


class GcsReplacement(GcsPublication):
    """A `Publication` that takes the place of another: published beside it, as `<target>.new`, and copied over it."""

    def __init__(self, target_uri: str, replaces: Collection[str], *, chunk_bytes: int, keep: bool = False) -> None:
        target = target_uri.rstrip("/")
        super().__init__(f"{target}{NEW}", chunk_bytes=chunk_bytes, keep=keep)
        self._target = target
        self._replaces = replaces

    def publish(self) -> None:
        super().publish()
        replace_objects(self.uri, self._target, self._replaces)


def unfinished_replacement(uri: str, client: GcsClient | None = None) -> str | None:
    """The whole publication that was to take the place of `uri`, by a run that was killed before it did."""
    new = f"{uri.rstrip('/')}{NEW}"
    name, path = split_uri(new)
    client = client or shared_client()
    infos = client.run(listed(Bucket(client, name), f"{path}/"))
    return new if any(LAST_KEY in info.metadata for info in infos) else None


def replace_objects(new_uri: str, old_uri: str, replaces: Collection[str], client: GcsClient | None = None) -> None:
    """Put the published `new_uri` in the place of `old_uri`, in the same bucket, and remove what was there.

    Removed are the files named in `replaces`, and what podquant itself has written there; anything else is an error,
    and nothing is touched.

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
        client.run(_replace(bucket, f"{new}/", f"{old}/", frozenset(replaces)))
    finally:
        lock.release()


async def _replace(bucket: Bucket, new: str, old: str, replaces: frozenset[str]) -> None:
    infos = [info for info in await listed(bucket, new) if not is_folder(info)]
    last = [info for info in infos if LAST_KEY in info.metadata]
    if len(last) != 1:
        raise StorageError(
            f"{bucket.uri(old)}: cannot replace by {bucket.uri(new)}: expected one file there that was published last, "
            f"found {len(last)}. Nothing was changed: publish there first."
        )

    async def copy(info: ObjectInfo, more: Mapping[str, str]) -> None:
        target = f"{old}{info.name.removeprefix(new)}"
        await bucket.copy(info, target, metadata={TARGET_KEY: bucket.uri(old).rstrip("/"), **more})

    before = [info for info in await listed(bucket, old) if not is_folder(info)]
    _refuse_more_than(replaces, before, bucket, old)
    mark = f"{old}{last[0].name.removeprefix(new)}"
    await bucket.delete_all(info for info in before if info.name == mark)
    await bucket.delete_all(info for info in before if info.name != mark)
    await asyncio.gather(*(copy(info, {}) for info in infos if info is not last[0]))
    await copy(last[0], {LAST_KEY: "true"})
    await bucket.delete_all(last)
    await bucket.delete_all(info for info in infos if info is not last[0])


def _refuse_more_than(replaces: frozenset[str], infos: list[ObjectInfo], bucket: Bucket, old: str) -> None:
    own = bucket.uri(old).rstrip("/")
    names = [info.name.removeprefix(old) for info in infos if info.metadata.get(TARGET_KEY) != own]
    more = sorted(set(names) - replaces)
    if more:
        raise StorageError(
            f"{own}: holds files that are no part of what is to be replaced: {', '.join(more[:5])}"
            f"{' and more' if len(more) > 5 else ''}. Nothing was touched: move them away and run again"
        )
