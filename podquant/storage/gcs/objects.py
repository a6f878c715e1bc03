"""Operations on the objects of a bucket: list, read ranges, create, replace if unchanged, copy, delete.

An object that podquant writes carries an id of that write in its metadata, so that a write whose response was lost is
recognised as our own when it is found. Knows nothing of directories, artifacts or locks.
"""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import google_crc32c

from podquant.storage.gcs.client import GcsClient, GcsError, GcsTransientError, bucket_url, object_url, read_json
from podquant.storage.http_reading import RangeRead
from podquant.storage.retry import Patience, TransientError

WRITE_KEY = "podquant-write"
_FIELDS = "name,size,generation,crc32c,updated,metadata"


@dataclass(frozen=True)
class ObjectInfo:
    """An object as the store describes it. `crc32c` is None where the store gives none."""

    name: str
    size: int
    generation: str
    crc32c: int | None
    updated: datetime
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, resource: Mapping[str, Any]) -> ObjectInfo:
        """From the JSON of the API."""
        crc32c = resource.get("crc32c")
        return cls(
            resource["name"],
            int(resource["size"]),
            str(resource["generation"]),
            None if crc32c is None else decode_crc32c(crc32c),
            datetime.fromisoformat(resource["updated"]),
            resource.get("metadata", {}),
        )


def decode_crc32c(text: str) -> int:
    """The number behind the API's form: big-endian, base64."""
    return int.from_bytes(base64.b64decode(text), "big")


def encode_crc32c(crc32c: int) -> str:
    """The API's form of a CRC32C."""
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()


@dataclass(frozen=True)
class Bucket:
    """The objects of one bucket; every method raises `GcsError` naming the object."""

    client: GcsClient
    name: str

    def uri(self, name: str) -> str:
        """An object in full."""
        return f"gs://{self.name}/{name}"

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Every object whose name starts with `prefix`; by the store's default, one request per thousand."""
        query: dict[str, str | int] = {"prefix": prefix, "fields": f"items({_FIELDS}),nextPageToken"}
        url = f"{bucket_url(self.client.base, self.name)}/o"
        while True:
            page = await self.client.retry(
                "list", self.uri(prefix), lambda: self.client.once("GET", url, read_json, query=query)
            )
            for item in page.get("items", ()):
                yield ObjectInfo.parse(item)
            if not page.get("nextPageToken"):
                return
            query["pageToken"] = page["nextPageToken"]

    async def stat(self, name: str) -> ObjectInfo:
        """One object's description."""
        return (await self.stat_dated(name))[0]

    async def stat_dated(self, name: str) -> tuple[ObjectInfo, datetime]:
        """One object's description and the store's own time, for ages that do not depend on this host's clock."""

        async def consume(answer: aiohttp.ClientResponse) -> tuple[ObjectInfo, datetime]:
            date = answer.headers.get("Date")
            now = parsedate_to_datetime(date) if date else datetime.now(UTC)
            return ObjectInfo.parse(await read_json(answer)), now

        url = object_url(self.client.base, self.name, name)
        return await self.client.retry(  # type: ignore[no-any-return]
            "look up", self.uri(name), lambda: self.client.once("GET", url, consume, query={"fields": _FIELDS})
        )

    async def read(self, info: ObjectInfo) -> bytes:
        """This generation of an object, whole, its CRC32C checked."""

        async def consume(answer: aiohttp.ClientResponse) -> bytes:
            data = await answer.read()
            found = google_crc32c.value(data)
            if info.crc32c is not None and found != info.crc32c:
                raise TransientError(f"expected CRC32C {info.crc32c:08x}, got {found:08x}")
            return data

        url = object_url(self.client.base, self.name, info.name)
        query = {"alt": "media", "generation": info.generation}
        return await self.client.retry(  # type: ignore[no-any-return]
            "read", self.uri(info.name), lambda: self.client.once("GET", url, consume, query=query)
        )

    async def read_into(self, info: ObjectInfo, offset: int, view: memoryview) -> int:
        """Fill `view` from `offset` on and return the bytes read: fewer than asked for only where the object ends.

        A read whose connection drops resumes where it dropped.
        """
        wanted = min(len(view), max(0, info.size - offset))
        part = RangeRead(view[:wanted], offset)

        async def attempt() -> None:
            # A whole object (200) in response to a range request would be far too many bytes.
            await self.client.once("GET", url, part.take, query=query, headers=part.headers(), accept=frozenset({206}))

        query = {"alt": "media", "generation": info.generation}
        url = object_url(self.client.base, self.name, info.name)
        if wanted:
            await self.client.retry(f"read at offset {offset:,}", self.uri(info.name), attempt)
        return wanted

    async def put(
        self,
        name: str,
        data: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        generation: str = "0",
        patience: Patience | None = None,
    ) -> ObjectInfo:
        """Write an object in one request, if it does not exist ("0") or still has the generation named.

        Raises:
            GcsError: status 412 when another process wrote it; the store's CRC32C differs after several attempts.
        """
        write = uuid.uuid4().hex
        described = {
            "name": name,
            "crc32c": encode_crc32c(google_crc32c.value(data)),  # the store refuses bytes that do not match
            "metadata": {**(metadata or {}), WRITE_KEY: write},
        }
        boundary = f"podquant-{write}"
        body = b"".join(
            (
                f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n".encode(),
                json.dumps(described).encode(),
                f"\r\n--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n".encode(),
                data,
                f"\r\n--{boundary}--\r\n".encode(),
            )
        )
        url = f"{bucket_url(self.client.upload_base, self.name)}/o"

        async def attempt() -> ObjectInfo:
            info = ObjectInfo.parse(
                await self.client.once(
                    "POST",
                    url,
                    read_json,
                    query={"uploadType": "multipart", "ifGenerationMatch": generation, "fields": _FIELDS},
                    headers={"Content-Type": f'multipart/related; boundary="{boundary}"'},
                    data=body,
                )
            )
            return info

        try:
            info: ObjectInfo = await self.client.retry("write", self.uri(name), attempt, patience)
        except GcsError as error:
            if error.status != 412:
                raise
            info = await self.stat(name)
            if info.metadata.get(WRITE_KEY) != write:
                raise
        await self.check(info, len(data), google_crc32c.value(data))
        return info

    async def check(self, info: ObjectInfo, size: int, crc32c: int) -> None:
        """Delete a new object and raise if the store reports another size or CRC32C than was sent."""
        if info.size == size and info.crc32c == crc32c:
            return
        await self.delete(info)
        got = "none" if info.crc32c is None else f"{info.crc32c:08x}"
        raise GcsTransientError(
            f"{self.uri(info.name)}: the store did not get what was sent: expected {size:,} bytes with CRC32C "
            f"{crc32c:08x}, got {info.size:,} with {got}. The object was removed: run again."
        )

    async def delete(self, info: ObjectInfo, patience: Patience | None = None) -> None:
        """Remove this generation of an object; one that is gone, or has another generation, is left alone."""
        url = object_url(self.client.base, self.name, info.name)

        async def attempt() -> None:
            await self.client.once(
                "DELETE",
                url,
                _ignore,
                query={"ifGenerationMatch": info.generation},
                accept=frozenset({200, 204, 404, 412}),
            )

        await self.client.retry("delete", self.uri(info.name), attempt, patience)

    async def delete_all(self, infos: Iterable[ObjectInfo], patience: Patience | None = None) -> None:
        """Remove objects concurrently."""
        await asyncio.gather(*(self.delete(info, patience) for info in infos))

    async def copy(self, source: ObjectInfo, name: str, *, metadata: Mapping[str, str]) -> None:
        """Copy an object inside the bucket, without moving its bytes through this host; replaces what is there."""
        body = json.dumps({"metadata": dict(metadata)}).encode()
        url = f"{object_url(self.client.base, self.name, source.name)}/rewriteTo/" + object_url(
            "", self.name, name
        ).lstrip("/")
        query: dict[str, str | int] = {"sourceGeneration": source.generation}
        headers = {"Content-Type": "application/json"}
        while True:
            answer = await self.client.retry(
                f"copy to {self.uri(name)}",
                self.uri(source.name),
                lambda: self.client.once("POST", url, read_json, query=query, headers=headers, data=body),
            )
            if answer["done"]:
                return await self.check(ObjectInfo.parse(answer["resource"]), source.size, source.crc32c or 0)
            query["rewriteToken"] = answer["rewriteToken"]


async def _ignore(answer: aiohttp.ClientResponse) -> None:
    await answer.read()
