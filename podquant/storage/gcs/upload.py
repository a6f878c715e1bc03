"""One object written front to back in bounded memory: a resumable upload, checked by CRC32C. A `Writer`.

The object appears when it is closed, whole, or not at all. At most two chunks are in memory: one being filled while the
other is in flight; a chunk is kept until the store confirms it. Knows nothing of directories or artifacts.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Buffer, Mapping
from concurrent.futures import Future

import aiohttp
import google_crc32c
import numpy as np
import numpy.typing as npt

from podquant.errors import StorageError
from podquant.storage.gcs.chunks import CHUNK_BYTES
from podquant.storage.gcs.client import GcsError, bucket_url
from podquant.storage.gcs.objects import Bucket, ObjectInfo, encode_crc32c
from podquant.storage.retry import TransientError

_ABANDON_SECONDS = 5.0
_CHECKSUM_BYTES = 1 << 20  # copied, then checksummed, at a time: few enough to be still in the CPU's cache


class GcsWriter:
    """A `Writer` of one new object; never overwrites one.

    Where an object of this name exists already (another attempt at the same work was faster), what is written is
    compared with it: equal bytes count as written, others are an error.
    """

    def __init__(
        self,
        bucket: Bucket,
        object_name: str,
        name: str,
        *,
        metadata: Mapping[str, str],
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Sends nothing yet. `name` is the file's name inside its publication."""
        self._bucket = bucket
        self._object = object_name
        self._name = name
        self._metadata = dict(metadata)
        self._filling, self._sending = (np.empty(chunk_bytes, np.uint8) for _ in range(2))
        self._filled = 0
        self._sent = 0  # bytes of the object in chunks handed over
        self._crc32c = 0
        self._session: str | None = None
        self._in_flight: Future[ObjectInfo | None] | None = None
        self._is_there = False  # the object, written by another: nothing more is sent
        self._is_closed = False
        self._info: ObjectInfo | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def nbytes(self) -> int:
        return self._sent + self._filled

    @property
    def crc32c(self) -> int:
        return self._crc32c

    @property
    def is_closed(self) -> bool:
        """Whether the object has been ended."""
        return self._is_closed

    def describe(self, key: str, value: str) -> None:
        """Add to the object's metadata; before the first chunk is sent."""
        self._metadata[key] = value

    def write(self, buffer: Buffer) -> None:
        if self._is_closed:
            raise StorageError(f"{self._bucket.uri(self._object)}: written to after it was closed.")
        data = np.frombuffer(buffer, np.uint8)
        done = 0
        while done < len(data):
            if self._filled == len(self._filling):
                self._hand_over(is_last=False)
            count = min(len(data) - done, len(self._filling) - self._filled, _CHECKSUM_BYTES)
            part = self._filling[self._filled : self._filled + count]
            part[:] = data[done : done + count]
            self._crc32c = google_crc32c.extend(self._crc32c, part)
            self._filled += count
            done += count

    def close(self) -> None:
        """Send the rest, and wait until the store has the object with the CRC32C of what was written."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._info = self._finish()
        except GcsError as error:
            if error.status != 412:
                raise
            self._info = self._compare()
        self._free()

    def abandon(self) -> None:
        """Discard an object that is not closed; the store then drops what it has of it."""
        if self._is_closed and self._info is not None:
            return
        self._is_closed = True
        if self._in_flight is not None:
            self._in_flight.cancel()
        if self._session is not None:
            with contextlib.suppress(StorageError):
                self._bucket.client.run(self._cancel(self._session))
        self._free()

    def _finish(self) -> ObjectInfo:
        client = self._bucket.client
        if self._sent == 0:
            data = self._filling[: self._filled].tobytes()
            return client.run(self._bucket.put(self._object, data, metadata=self._metadata))
        self._hand_over(is_last=True)
        info = self._wait()
        if info is None:  # it is there already
            return self._compare()
        client.run(self._bucket.check(info, self.nbytes, self._crc32c))
        return info

    def _compare(self) -> ObjectInfo:
        info = self._bucket.client.run(self._bucket.stat(self._object))
        if (info.size, info.crc32c) != (self.nbytes, self._crc32c):
            raise GcsError(
                f"{self._bucket.uri(self._object)}: another job has written it with other content: expected "
                f"{self.nbytes:,} bytes with CRC32C {self._crc32c:08x}, got {info.size:,} with {info.crc32c or 0:08x}. "
                "Make sure that only one job writes there, remove what is there, and run again."
            )
        return info

    def _free(self) -> None:
        self._sent, self._filled = self.nbytes, 0
        self._filling = self._sending = np.empty(0, np.uint8)

    def _hand_over(self, *, is_last: bool) -> None:
        """Wait for the chunk in flight, then send the filled one in the background."""
        self._wait()
        chunk = self._filling[: self._filled]
        self._filling, self._sending = self._sending, self._filling
        work = self._send(chunk, self._sent, is_last=is_last)
        self._sent, self._filled = self._sent + self._filled, 0
        self._in_flight = self._bucket.client.start(work)

    def _wait(self) -> ObjectInfo | None:
        future, self._in_flight = self._in_flight, None
        if future is None:
            return None
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _send(self, chunk: npt.NDArray[np.uint8], offset: int, *, is_last: bool) -> ObjectInfo | None:
        """Send a chunk until the store has all of it; returns the object after the last one, if it is ours."""
        if self._session is None and not self._is_there:
            self._session = await self._begin()
        session = self._session
        if session is None:  # it is there
            return None
        total = str(offset + len(chunk)) if is_last else "*"
        stop = offset + len(chunk)
        stored = offset
        is_known = True  # whether `stored` is what the store has

        async def attempt() -> ObjectInfo | None:  # a loop: recursion would keep the chunk alive in a cycle
            nonlocal stored, is_known
            while True:
                if is_known:
                    is_known = False
                    part = memoryview(chunk)[stored - offset :]
                    headers = {"Content-Range": f"bytes {stored}-{stop - 1}/{total}"}
                    if is_last:
                        headers["X-Goog-Hash"] = f"crc32c={encode_crc32c(self._crc32c)}"
                else:
                    part = memoryview(b"")
                    headers = {"Content-Range": f"bytes */{total}"}
                answer = await self._bucket.client.once(
                    "PUT", session, _progress, headers=headers, data=part, accept=frozenset({200, 201, 308})
                )
                if isinstance(answer, ObjectInfo):
                    return answer
                if not offset <= answer <= stop:
                    raise GcsError(
                        f"{self._bucket.uri(self._object)}: the store has {answer:,} bytes of an upload that has sent "
                        f"{offset:,} to {stop:,}. Another writes to the same upload: run again."
                    )
                stored, is_known = answer, True  # not a failure: the store took a part, or was asked what it has
                if stored == stop and not is_last:
                    return None

        return await self._bucket.client.retry(  # type: ignore[no-any-return]
            f"write, at offset {offset:,}, {len(chunk):,} bytes", self._bucket.uri(self._object), attempt
        )

    async def _begin(self) -> str | None:
        """The address to send chunks to; None, with `_is_there` set, if the object exists."""
        client = self._bucket.client
        body = json.dumps({"name": self._object, "metadata": self._metadata}).encode()

        async def consume(answer: aiohttp.ClientResponse) -> str:
            await answer.read()
            if "Location" not in answer.headers:
                raise TransientError("an upload session without its address")
            return answer.headers["Location"]

        async def attempt() -> str:
            return await client.once(  # type: ignore[no-any-return]
                "POST",
                f"{bucket_url(client.upload_base, self._bucket.name)}/o",
                consume,
                query={"uploadType": "resumable", "ifGenerationMatch": "0"},
                headers={"Content-Type": "application/json", "X-Upload-Content-Type": "application/octet-stream"},
                data=body,
            )

        try:
            return await client.retry("start writing", self._bucket.uri(self._object), attempt)  # type: ignore[no-any-return]
        except GcsError as error:
            if error.status != 412:
                raise
            self._is_there = True
            return None

    async def _cancel(self, session: str) -> None:
        async def consume(answer: aiohttp.ClientResponse) -> None:
            await answer.read()

        client = self._bucket.client
        accept = frozenset({200, 204, 404, 410, 499})
        await client.retry(
            "give up writing",
            self._bucket.uri(self._object),
            lambda: client.once("DELETE", session, consume, accept=accept),
            client.patience.within(_ABANDON_SECONDS),
        )


async def _progress(answer: aiohttp.ClientResponse) -> ObjectInfo | int:
    """The bytes that the store has, or the object it made of them."""
    body = await answer.read()
    if answer.status != 308:
        try:
            return ObjectInfo.parse(json.loads(body))
        except (ValueError, KeyError) as error:
            raise TransientError(f"a response that describes no object: {body[:80]!r}") from error
    stored = re.fullmatch(r"(?:bytes=)?0-(\d+)", answer.headers.get("Range", ""))
    return int(stored[1]) + 1 if stored else 0
