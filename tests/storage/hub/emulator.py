"""The Hugging Face hub over real HTTP, in memory: a hub, a CDN on another port, faults on demand, and all requests.

`with HubEmulator() as hub:` serves from a thread. Follows what huggingface_hub asks for and how huggingface.co answers:
`/api/models/ID/revision/REV?blobs=true`; `/ID/resolve/COMMIT/FILE`, which sends large files to a signed link on the CDN
and small ones to a place of its own; `X-Error-Code` with every refusal. Knows no access but one token.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import quote, unquote

from aiohttp import web

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = 1000  # bytes; from here on files lie on the CDN
_RANGE = re.compile(r"bytes=(\d+)-(\d+)$")


@dataclass
class Fault:
    """What to do to the next `times` requests whose "host METHOD /path" (host `hub` or `cdn`) matches `request`.

    kind: `status` (refuse), `reset` (drop the connection after `after` bytes of the body), `whole` (200 for a range),
    `size` (tell another size of the file), `corrupt` (flip a bit), `elsewhere` (send to `headers["Location"]`).
    """

    kind: str
    request: str
    times: int = 1
    status: int = 503
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Record:
    """One request, and the bytes of the body of its answer."""

    request: str
    token: str | None
    nbytes: int = 0


class HubEmulator:
    """The service. Everything may be looked at and changed between requests."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}  # of any commit, where there is no "ID@COMMIT"
        self.revisions = {"main": COMMIT, COMMIT: COMMIT}
        self.log: list[Record] = []
        self.faults: list[Fault] = []
        self.signature = 0  # of links to the CDN; another one ends those given out
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.url, self.cdn_url = asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def fail(self, kind: str, request: str, **options: Any) -> None:
        """Add a fault."""
        self.faults.append(Fault(kind, request, **options))

    def push(self, model: str, files: dict[str, bytes]) -> str:
        """Make the main branch a new commit with these files of a model; older commits keep theirs."""
        commit = f"{len(self.revisions):040x}"
        self.revisions |= {"main": commit, commit: commit}
        self.models[f"{model}@{commit}"] = files
        self.models.setdefault(model, files)
        return commit

    def requests(self, request: str) -> list[Record]:
        """The requests so far that match."""
        return [record for record in self.log if re.search(request, record.request)]

    async def _serve(self) -> tuple[str, str]:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        for _ in range(2):
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        hub, cdn = (f"http://127.0.0.1:{address[1]}" for address in self._runner.addresses)
        return hub, cdn

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        host = "hub" if self.url.endswith(f":{request.url.port}") else "cdn"
        path = unquote(request.raw_path)
        record = Record(f"{host} {request.method} {path}", request.headers.get("Authorization"))
        self.log.append(record)
        fault = next((f for f in self.faults if f.times > 0 and re.search(f.request, record.request)), None)
        if fault is not None:
            fault.times -= 1
            if fault.kind == "status":
                return web.json_response({"error": "injected"}, status=fault.status, headers=fault.headers)
            if fault.kind == "elsewhere":
                return web.Response(status=302, headers=fault.headers)
        if path == "/api/agent-harnesses":  # huggingface_hub asks where it takes its caller for an agent
            return _refusal(404, "EntryNotFound")
        answer = self._answer(host, path)
        if isinstance(answer, web.Response):
            return answer
        return await self._send(request, answer, record, fault)

    def _answer(self, host: str, path: str) -> web.Response | bytes:
        """An answer, or a file to send a range of."""
        if found := re.fullmatch(r"/(?:cdn|cache)/(\d+)/([^/]+/[^/]+)/(.+)", path):
            return self.models[found[2]][found[3]] if int(found[1]) == self.signature else web.Response(status=403)
        found = re.fullmatch(r"(/api/models)?/([^/]+/[^/]+)/(?:revision|resolve)/(.+)", path)
        assert found is not None, path
        if found[2] not in self.models:
            return _refusal(401, "RepoNotFound")
        if found[1]:
            commit = self.revisions.get(found[3].removesuffix("?blobs=true"))
            if commit is None:
                return _refusal(404, "RevisionNotFound")
            return _listing(commit, self.models[self._at(found[2], commit)])
        commit, _, name = found[3].partition("/")
        model = self._at(found[2], commit)
        files = self.models[model]
        if commit not in self.revisions.values() or name not in files:
            return _refusal(404, "EntryNotFound")
        link = f"{self.signature}/{model}/{quote(name)}"
        if len(files[name]) >= _LARGE:
            return web.Response(status=302, headers={"Location": f"{self.cdn_url}/cdn/{link}"})
        return web.Response(status=307, headers={"Location": f"/cache/{link}"})

    def _at(self, model: str, commit: str) -> str:
        pushed = f"{model}@{commit}"
        return pushed if pushed in self.models else model

    async def _send(self, request: web.Request, data: bytes, record: Record, fault: Fault | None) -> web.StreamResponse:
        asked = _RANGE.match(request.headers.get("Range", ""))
        kind = fault.kind if fault is not None else ""
        start, stop = (0, len(data)) if asked is None else (int(asked[1]), int(asked[2]) + 1)
        body = bytearray(data[start:stop])
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data) + (kind == 'size')}"}
        if kind == "corrupt":
            body[0] ^= 1
        answer = web.StreamResponse(status=200 if asked is None or kind == "whole" else 206, headers=headers)
        answer.content_length = len(body)
        await answer.prepare(request)
        sent = body[: fault.after] if fault is not None and kind == "reset" else body
        record.nbytes = len(sent)
        await answer.write(sent)
        if kind == "reset":
            await asyncio.sleep(0.05)  # so that what was sent arrives
            assert request.transport is not None
            request.transport.abort()
        return answer


def _listing(commit: str, files: dict[str, bytes]) -> web.Response:
    siblings = []
    for name, data in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
        if len(data) >= _LARGE:
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 135}
        siblings.append(entry)
    return web.json_response({"id": "org/name", "sha": commit, "siblings": siblings})


def _refusal(status: int, code: str) -> web.Response:
    return web.json_response({"error": code}, status=status, headers={"X-Error-Code": code})
