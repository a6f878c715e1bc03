"""Cloud Storage's JSON API over real HTTP, in memory, with faults on demand and an account of every request.

`with GcsEmulator() as emulator:` serves from a thread; `python gcs_emulator.py --port 0` from a process of its own,
which prints its address; `/_control` then takes faults and tells the log. Follows the documentation in what podquant
and gcsfs ask for: preconditions (412), resumable uploads with status queries, generations, CRC32C, paging, rewrites.
Knows no permissions, versions or multipart XML uploads; a refusal is a fault put there by the test.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import itertools
import json
import re
import threading
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, unquote

import google_crc32c
from aiohttp import web

from tests.storage.gcs.faults import Fault, Record

_OBJECT = re.compile(r"(?:/download|/upload)?/storage/v1/b/([^/]+)(?:/o(?:/(.+?))?)?(?:/rewriteTo/b/([^/]+)/o/(.+))?$")
_PIECE = 256 << 10


@dataclass
class Blob:
    """An object. `data` never changes; another write makes another object."""

    bucket: str
    name: str
    data: bytes
    generation: int
    updated: datetime
    metadata: dict[str, str]
    crc32c: int

    def resource(self) -> dict[str, Any]:
        """As the API describes it; its integers are text."""
        return {
            "bucket": self.bucket,
            "name": self.name,
            "size": str(len(self.data)),
            "generation": str(self.generation),
            "crc32c": encode_crc32c(self.crc32c),
            "updated": self.updated.isoformat().replace("+00:00", "Z"),
            "contentType": "application/octet-stream",
            "metadata": self.metadata,
        }


@dataclass
class _Upload:
    bucket: str
    name: str
    metadata: dict[str, str]
    query: dict[str, str]
    chunks: list[bytes | bytearray] = field(default_factory=list)
    size: int = 0
    done: Blob | None = None


class _Refusal(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Dropped(Exception):
    """The connection is to be dropped without an answer."""


class GcsEmulator:
    """The service. `buckets`, `log` and `faults` may be looked at and changed between requests."""

    def __init__(self, *buckets: str, port: int = 0) -> None:
        self.buckets: dict[str, dict[str, Blob]] = {name: {} for name in buckets}
        self.log: list[Record] = []
        self.faults: list[Fault] = []
        self.page_size = 1000
        self._port = port
        self._generations = itertools.count(1_700_000_000_000_001)
        self._uploads: dict[str, _Upload] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def put(
        self, bucket: str, name: str, data: bytes, metadata: dict[str, str] | None = None, *, age: float = 0.0
    ) -> Blob:
        """Place an object, without HTTP, `age` seconds ago."""
        updated = datetime.now(UTC) - timedelta(seconds=age)
        blob = Blob(bucket, name, data, next(self._generations), updated, metadata or {}, google_crc32c.value(data))
        self.buckets.setdefault(bucket, {})[name] = blob
        return blob

    def data(self, bucket: str) -> dict[str, bytes]:
        """Every object's bytes."""
        return {name: blob.data for name, blob in sorted(self.buckets[bucket].items())}

    def fail(self, kind: str, request: str = ".", **options: Any) -> Fault:
        """Add a fault."""
        self.faults.append(Fault(kind, request, **options))
        return self.faults[-1]

    def requests(self, request: str) -> list[Record]:
        """The requests so far that match."""
        return [record for record in self.log if re.search(request, record.request)]

    async def _serve(self) -> None:
        app = web.Application(client_max_size=1 << 40)
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, read_bufsize=1 << 20)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self.url = "http://{}:{}".format(*self._runner.addresses[0][:2])

    async def _stop(self) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path, _, query = request.raw_path.partition("?")
        if path == "/_control":
            return await self._control(request)
        record = Record(f"{request.method} {unquote(path)}{'?' if query else ''}{unquote(query)}")
        self.log.append(record)
        fault = self._next_fault(record.request)
        try:
            if fault is not None and fault.kind == "status":
                record.bytes_in = len(await request.read())
                return _error(record, fault.status, fault.message, fault.headers)
            answer = await self._answer(request, path, dict(parse_qsl(query)), record, fault)
            if fault is not None and fault.kind == "lost":
                raise _Dropped
            record.status = answer.status
            return answer
        except _Refusal as error:
            return _error(record, error.status, str(error), {})
        except (_Dropped, ConnectionResetError):
            if request.transport is not None:
                request.transport.abort()
            return web.Response()

    def _next_fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.request, request):
                fault.skip -= 1
                if fault.skip < 0:
                    fault.times -= 1
                    return fault
        return None

    async def _control(self, request: web.Request) -> web.Response:
        if request.method == "GET":
            return web.json_response([asdict(record) for record in self.log])
        for fault in await request.json():
            self.fail(**fault)
        return web.Response()

    async def _answer(
        self, request: web.Request, path: str, query: dict[str, str], record: Record, fault: Fault | None
    ) -> web.StreamResponse:
        body = await _body(request, record, fault)
        if "upload_id" in query:
            return self._chunk(request, query["upload_id"], body, fault)
        found = _OBJECT.match(path)
        if found is None:
            raise _Refusal(400, f"no such address: {path}")
        bucket, name, _, target = (None if part is None else unquote(part) for part in found.groups())
        assert bucket is not None
        if bucket not in self.buckets:
            raise _Refusal(404, "The specified bucket does not exist.")
        if path.startswith("/upload"):
            return self._begin(request, bucket, query, body, fault)
        if name is None:
            return self._list(bucket, query) if path.endswith("/o") else web.json_response({"name": bucket})
        blob = self._find(bucket, name, query.get("generation") or query.get("sourceGeneration"))
        if target is not None:
            copy = self._store(bucket, target, blob.data, json.loads(body or b"{}").get("metadata", {}), query, fault)
            return web.json_response({"done": True, "resource": copy.resource()})
        self._require(bucket, name, query)
        if request.method == "DELETE":
            del self.buckets[bucket][name]
            return web.Response(status=204)
        if query.get("alt") == "media" or path.startswith("/download"):
            return await self._media(request, blob, record, fault)
        return web.json_response(blob.resource())

    def _find(self, bucket: str, name: str, generation: str | None) -> Blob:
        blob = self.buckets[bucket].get(name)
        if blob is None or (generation is not None and str(blob.generation) != generation):
            raise _Refusal(404, f"No such object: {bucket}/{name}")
        return blob

    def _require(self, bucket: str, name: str, query: dict[str, str]) -> None:
        blob = self.buckets[bucket].get(name)
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and wanted != (str(blob.generation) if blob else "0"):
            raise _Refusal(412, "At least one of the pre-conditions you specified did not hold.")

    def _list(self, bucket: str, query: dict[str, str]) -> web.Response:
        start = query.get("pageToken", "")
        names = sorted(n for n in self.buckets[bucket] if n.startswith(query.get("prefix", "")) and n > start)
        page = names[: min(self.page_size, int(query.get("maxResults", self.page_size)))]
        answer: dict[str, Any] = {"items": [self.buckets[bucket][name].resource() for name in page]}
        if len(page) < len(names):
            answer["nextPageToken"] = page[-1]
        return web.json_response(answer)

    async def _media(self, request: web.Request, blob: Blob, record: Record, fault: Fault | None) -> web.StreamResponse:
        start, stop, status = 0, len(blob.data), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked:
            start, stop, status = int(asked[1]), min(stop, int(asked[2] or stop) + 1), 206
            if start >= len(blob.data):
                raise _Refusal(416, "The requested range cannot be satisfied.")
        data = memoryview(blob.data)[start:stop]
        headers = {
            "Content-Length": str(len(data)),
            "x-goog-generation": str(blob.generation),
            "x-goog-hash": f"crc32c={encode_crc32c(blob.crc32c)}",
        }
        if asked:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(blob.data)}"
        if fault is not None and fault.kind == "corrupt":
            data = memoryview(bytes([data[0] ^ 1]) + data[1:])
        response = web.StreamResponse(status=status, headers=headers)
        limit = fault.after if fault is not None and fault.kind in ("reset", "stall", "truncate") else len(data)
        await response.prepare(request)
        for offset in range(0, limit, _PIECE):
            piece = data[offset : min(limit, offset + _PIECE)]
            record.bytes_out += len(piece)  # before the one who gets it can look
            await response.write(piece)
        if fault is not None and fault.kind == "stall":
            await asyncio.sleep(fault.seconds)
        if fault is not None and fault.kind == "truncate" and request.transport is not None:
            request.transport.close()  # after what was written is sent
        if fault is not None and fault.kind == "reset":
            raise _Dropped
        return response

    def _begin(
        self, request: web.Request, bucket: str, query: dict[str, str], body: bytearray, fault: Fault | None
    ) -> web.Response:
        if query["uploadType"] == "multipart":
            described, data = _multipart(request.headers["Content-Type"], body)
            expected = described.get("crc32c")
            if fault is not None and fault.kind == "corrupt":
                data = data[:-1] + bytes([data[-1] ^ 1])
            if expected not in (None, encode_crc32c(google_crc32c.value(data))):
                raise _Refusal(400, f"Provided CRC32C {expected!r} doesn't match calculated CRC32C.")
            blob = self._store(bucket, described["name"], data, described.get("metadata", {}), query, fault)
            return web.json_response(blob.resource())
        described = json.loads(body)
        name = described.get("name") or query["name"]
        self._require(bucket, name, query)
        key = f"upload-{next(self._generations)}"
        self._uploads[key] = _Upload(bucket, name, described.get("metadata", {}), query)
        return web.Response(headers={"Location": f"{self.url}/upload/storage/v1/b/{bucket}/o?upload_id={key}"})

    def _chunk(self, request: web.Request, key: str, body: bytearray, fault: Fault | None) -> web.Response:
        upload = self._uploads.get(key)
        if upload is None:
            raise _Refusal(404, "No such upload.")
        if request.method == "DELETE":
            del self._uploads[key]
            return web.Response(status=499)
        if upload.done is not None:
            return web.json_response(upload.done.resource())
        asked = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", request.headers["Content-Range"])
        assert asked is not None
        if asked[1] is not None:
            there = upload.size - int(asked[1])
            if there < 0:
                raise _Refusal(503, f"the upload has {upload.size} bytes, got some from {asked[1]} on")
            kept = body[: fault.after] if fault is not None and fault.kind in ("short", "reset") else body
            if fault is not None and fault.kind == "corrupt":
                kept[0] ^= 1
            upload.chunks.append(kept[there:] if there else kept)  # what is there already is ignored
            upload.size += len(upload.chunks[-1])
            if fault is not None and fault.kind == "reset":
                raise _Dropped
        if asked[3] == "*" or upload.size < int(asked[3]):
            headers = {"Range": f"bytes=0-{upload.size - 1}"} if upload.size else {}
            return web.Response(status=308, headers=headers)
        data = b"".join(upload.chunks)
        upload.done = self._store(upload.bucket, upload.name, data, upload.metadata, upload.query, fault)
        upload.chunks.clear()
        return web.json_response(upload.done.resource())

    def _store(
        self, bucket: str, name: str, data: bytes, metadata: dict[str, str], query: dict[str, str], fault: Fault | None
    ) -> Blob:
        self._require(bucket, name, query)
        blob = self.put(bucket, name, data, metadata)
        blob.crc32c ^= fault is not None and fault.kind == "wrong_crc"
        return blob


async def _body(request: web.Request, record: Record, fault: Fault | None) -> bytearray:
    """The request's body; a reset cuts it short, and a request without one is dropped before it is done."""
    limit = fault.after if fault is not None and fault.kind == "reset" and request.method in ("PUT", "POST") else None
    body = bytearray()
    while limit is None or len(body) < limit:
        piece = await request.content.readany()
        if not piece:
            break
        body += piece
        record.bytes_in = len(body)
    is_media = request.method == "GET" and "alt=media" in record.request
    if fault is not None and fault.kind == "reset" and request.method != "PUT" and not is_media:
        raise _Dropped
    if fault is not None and fault.kind == "stall" and not is_media:
        await asyncio.sleep(fault.seconds)
    return body


def encode_crc32c(crc32c: int) -> str:
    """The API's form: big-endian, base64."""
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()


def _multipart(content_type: str, body: bytearray) -> tuple[dict[str, Any], bytes]:
    boundary = re.search(r'boundary="?([^";]+)"?', content_type)
    assert boundary is not None
    mark = b"--" + boundary[1].encode()
    assert body.startswith(mark)
    end = body.rindex(b"\r\n" + mark + b"--")
    first, second = body[len(mark) : end].split(b"\r\n" + mark, 1)
    return json.loads(first.split(b"\r\n\r\n", 1)[1]), bytes(second.split(b"\r\n\r\n", 1)[1])


def _error(record: Record, status: int, message: str, headers: dict[str, str]) -> web.Response:
    record.status = status
    return web.json_response({"error": {"code": status, "message": message}}, status=status, headers=headers)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bucket", action="append", default=[])
    parser.add_argument(
        "--load", action="append", default=[], metavar="DIRECTORY=PREFIX", help="files to put into the first bucket"
    )
    options = parser.parse_args()
    with GcsEmulator(*options.bucket, port=options.port) as emulator:
        for directory, _, prefix in (place.partition("=") for place in options.load):
            for path in Path(directory).iterdir():
                emulator.put(options.bucket[0], f"{prefix}/{path.name}", path.read_bytes())
        print(emulator.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
