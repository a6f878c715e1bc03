"""One writer at a time for one place in a bucket, among hosts. Knows nothing of what they write.

The lock is an object that exists while the lock is held; creating it only if it does not exist decides who holds it.
Its holder rewrites it regularly, as a heartbeat. Once the lease has passed without one, the holder is dead and another
process may take over: it replaces exactly the generation it saw, so only one of several succeeds. A process that finds
the lock taken watches it: at a heartbeat it gives up, at the end of the lease it takes over. Ages are measured by the
store's clock alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from concurrent.futures import Future
from datetime import UTC, datetime

from podquant.errors import StorageError
from podquant.storage.gcs.client import GcsError
from podquant.storage.gcs.objects import Bucket, ObjectInfo

LEASE_SECONDS = 30.0
"""A lock that has not been rewritten for this long may be taken over."""
_BEATS = 12  # in a lease
_LOOKS = 40
_OWNER = "podquant-lock"
_RELEASE_SECONDS = 10.0

_log = logging.getLogger(__name__)


class GcsLock:
    """An exclusive lock: the object `name` of a bucket."""

    def __init__(self, bucket: Bucket, name: str, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self._bucket = bucket
        self._name = name
        self._lease = lease_seconds
        self._patience = bucket.client.patience.within(lease_seconds / 2)
        self._info: ObjectInfo | None = None
        self._beating: Future[None] | None = None
        self._lost: GcsError | None = None
        self._turn = asyncio.Lock()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._owner = f"process {os.getpid()} on host {socket.gethostname()} (since {started})"

    def acquire(self, place: str) -> None:
        """Take the lock, or raise `StorageError` naming its holder once that is known to be alive.

        Blocks for a few seconds if it is, and for the rest of the lease if it died. `place` is what the lock protects.
        """
        self._info = self._bucket.client.run(self._acquire(place))
        self._beating = self._bucket.client.start(self._beat())

    def check(self) -> None:
        """Rewrite the lock now, which renews the lease; `StorageError` if another process has it."""
        if self._lost is None:
            with contextlib.suppress(GcsError):
                self._bucket.client.run(self._renew())
                return
        raise StorageError(
            f"{self._bucket.uri(self._name)}: this run lost its lock: it could not reach the store for more than "
            f"{self._lease:g} s, and another run may be writing there. Nothing was published: run again."
        ) from self._lost

    def release(self) -> None:
        """Remove the lock if it is still ours; if the store cannot be reached, the lock expires."""
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None
        if self._info is not None:
            with contextlib.suppress(StorageError):
                self._bucket.client.run(self._remove())
            self._info = None

    async def _acquire(self, place: str) -> ObjectInfo:
        generation = "0"
        watched: ObjectInfo | None = None
        while True:  # the lock may be released, or taken over, between two looks at it
            try:
                return await self._write(generation)
            except GcsError as error:
                if error.status != 412:
                    raise
            try:
                info, now = await self._bucket.stat_dated(self._name)
            except GcsError as error:
                if error.status != 404:
                    raise
                generation = "0"
                continue
            if _OWNER not in info.metadata:
                raise StorageError(
                    f"{self._bucket.uri(self._name)}: podquant needs this name for a lock while it writes {place}, and "
                    "did not write what is there. Nothing was touched: move it away, or choose another place"
                )
            age = (now - info.updated).total_seconds()
            if age > self._lease:
                generation = info.generation
                continue
            holder = info.metadata.get(_OWNER, "another job")
            if watched is not None and watched.generation != info.generation:
                raise StorageError(
                    f"{place}: {holder} is writing there. Wait until it ends, stop it (its lock expires "
                    f"{self._lease:g} s later), or choose another place."
                )
            if watched is None:
                left = self._lease - age
                _log.warning("%s: locked by %s: waiting for a heartbeat, %.0f s at most", place, holder, left)
            watched = info
            await asyncio.sleep(self._lease / _LOOKS)

    async def _beat(self) -> None:
        while self._lost is None:
            await asyncio.sleep(self._lease / _BEATS)
            with contextlib.suppress(GcsError):
                await self._renew()

    async def _renew(self) -> None:
        async with self._turn:
            assert self._info is not None, "acquired"
            try:
                self._info = await self._write(self._info.generation)
            except GcsError as error:
                if error.status in (404, 412):
                    self._lost = error
                raise

    async def _remove(self) -> None:
        async with self._turn:
            assert self._info is not None, "acquired"
            await self._bucket.delete(self._info, self._patience.within(_RELEASE_SECONDS))

    async def _write(self, generation: str) -> ObjectInfo:
        return await self._bucket.put(
            self._name,
            self._owner.encode(),
            metadata={_OWNER: self._owner},
            generation=generation,
            patience=self._patience,
        )
