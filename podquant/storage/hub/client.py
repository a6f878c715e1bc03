"""HTTP to the Hugging Face hub: what a commit holds, and ranges of its files.

huggingface_hub finds the endpoint and the token, so `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` mean what
they mean there. The requests are our own: the library (1.33) reads ranges only through a file system that asks the hub
again for each, copies them, and ignores `Retry-After`. Knows nothing of what files hold.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import re
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import httpx
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers, filter_repo_objects  # type: ignore[attr-defined]  # public, but not marked so
from yarl import URL

from podquant.errors import StorageError, TransientStorageError
from podquant.storage.http_reading import LoopThread, RangeRead, dropped, retry_after
from podquant.storage.hub.ids import FILES, NOT_CACHED, REASONS, UNREACHABLE, is_offline, refusal
from podquant.storage.retry import RETRIED_STATUSES, GaveUpError, Patience, TransientError, retried

_IN_FLIGHT = 16
_READ_BUFFER = 1 << 20  # bytes; fewer wake-ups of the event loop than aiohttp's 64 KiB
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 5  # a renamed model, the hub's cache of small files, its CDN
_OPEN_SECONDS = 30.0
"""For the listing, with all attempts: somebody waits for it."""
_COMMIT = re.compile("[0-9a-f]{40}")
_RESET = re.compile(r";\s*r=0\s*;\s*t=(\d+)")
"""In the header `RateLimit` of a 429 response: nothing remains (r), for t seconds. Sent in place of `Retry-After`."""


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it. `content`: `sha256:…` of the bytes, or `git:…`, the id of its git blob."""

    name: str
    size: int
    content: str


@dataclass(frozen=True)
class Commit:
    """The files of a model at one commit that `download_model` would download."""

    model: str
    sha: str
    files: Mapping[str, HubFile]

    @property
    def uri(self) -> str:
        """The place, in full."""
        return f"hf://{self.model}@{self.sha}"


class _RefusedError(Exception):
    """A final response (`status` 0: none); `code` is the hub's word for it, or empty."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{message} (HTTP {status})" if status else message)
        self.code = code


type _Take = Callable[[aiohttp.ClientResponse], Awaitable[Any]]


class HubClient(LoopThread):
    """Sends requests for callers in any thread. One serves a whole process; `close()` ends its thread.

    It remembers what commits hold, since they never change, and where files are on the hub's CDN, until that refuses.
    """

    def __init__(self, endpoint: str | None = None, patience: Patience | None = None) -> None:
        super().__init__("hub")
        # The hub counts requests in windows of five minutes, and refuses (429) for the rest of one.
        self.patience = patience or Patience(deadline=360.0)
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(_IN_FLIGHT)
        self._commits: dict[tuple[str, str], Commit] = {}
        self._links: dict[str, URL] = {}

    async def commit(self, model: str, revision: str) -> Commit:
        """The commit that a branch, tag or commit of a model is now; one request, none for a commit seen before.

        Raises:
            StorageError: no such model or revision, no access, or no connection.
        """
        known = self._commits.get((model, revision))
        if known is not None:
            return known
        if is_offline():
            raise refusal(model, revision, NOT_CACHED)
        url = f"{self.endpoint}/api/models/{model}/revision/{quote(revision, safe='')}?blobs=true"
        try:
            listing = await retried(lambda: self._ask(url, {}, _read_json, 200), self.patience.within(_OPEN_SECONDS))
            commit = _parse_commit(model, listing)
        except _RefusedError as error:
            raise refusal(model, revision, error.code, str(error)) from error
        except GaveUpError as error:
            raise TransientStorageError(str(refusal(model, revision, UNREACHABLE, str(error)))) from error
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"{url}: expected a listing with the size and id of each file, got something else ({error!r}). "
                "Check HF_ENDPOINT."
            ) from error
        return self._commits.setdefault((model, commit.sha), commit)

    async def read_into(self, commit: Commit, file: HubFile, offset: int, view: memoryview) -> None:
        """Fill `view` from `offset` on. A read whose connection drops resumes where it dropped."""
        place = f"{commit.uri}/{file.name}: cannot read at offset {offset:,}"
        url = f"{self.endpoint}/{commit.model}/resolve/{commit.sha}/{quote(file.name)}"
        part = RangeRead(view, offset, file.size)
        try:
            await retried(lambda: self._read(url, part), self.patience)
        except _RefusedError as error:
            if error.code in REASONS:
                raise refusal(commit.model, commit.sha, error.code) from error
            raise StorageError(
                f"{place}: {error}. Check HF_TOKEN and its rights, and HF_ENDPOINT, or pass --download-dir."
            ) from error
        except GaveUpError as error:
            raise TransientStorageError(
                f"{place}: {error}. Check the connection to the hub, then run again."
            ) from error

    async def _read(self, url: str, part: RangeRead) -> None:
        """One attempt. A link to the CDN, signed for about an hour, is used until it is refused."""
        if (link := self._links.get(url)) is not None:
            try:
                if not isinstance(await self._get(link, part.headers(), part.take, 206), URL):
                    return
            except _RefusedError:
                pass
            self._links.pop(url, None)
        await self._ask(url, part.headers(), part.take, 206)

    async def _ask(self, url: str, headers: Mapping[str, str], take: _Take, status: int) -> Any:
        """As `_get` of a URL of the hub, following redirects. The token is sent to the hub only."""
        at = hub = URL(url, encoded=True)
        for _ in range(_MOST_REDIRECTS):
            credentials = build_hf_headers() if at.origin() == hub.origin() else {}
            got = await self._get(at, {**credentials, **headers}, take, status)
            if not isinstance(got, URL):
                return got
            at = got
            if at.origin() != hub.origin():
                self._links[url] = at
        raise _RefusedError(0, "", f"more than {_MOST_REDIRECTS} redirects")

    async def _get(self, url: URL, headers: Mapping[str, str], take: _Take, status: int) -> Any:
        """One request: what `take` makes of a response with `status`, or the URL it redirects to."""
        async with self._slots:
            try:
                sent = {**headers, "Accept-Encoding": "identity"}
                async with self._connected().get(url, headers=sent, allow_redirects=False) as answer:
                    if answer.status in _REDIRECTS and "Location" in answer.headers:
                        return url.join(URL(answer.headers["Location"], encoded=True))
                    if answer.status == status:
                        return await take(answer)
                    raise await _refusal(answer)
            except aiohttp.ClientSSLError as error:
                raise _RefusedError(0, "", f"no secure connection: {error}") from error
            except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
                raise _RefusedError(0, "", f"no address: {error}") from error
            except (aiohttp.ClientError, ConnectionError) as error:
                raise dropped(error) from error

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            times = self.patience
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=times.connect, sock_read=times.silence),
                # The certificates that huggingface_hub trusts.
                connector=aiohttp.TCPConnector(limit=_IN_FLIGHT, ssl=httpx.create_ssl_context()),
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=_READ_BUFFER,
                trust_env=True,
            )
        return self._session

    async def _end(self) -> None:
        await super()._end()
        if self._session is not None:
            await self._session.close()


class _Shared:
    """The client of this process. A forked child gets its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[int, HubClient] = {}

    def get(self) -> HubClient:
        with self._lock:
            if os.getpid() not in self._clients:
                self._clients[os.getpid()] = client = HubClient()
                atexit.register(client.close)
            return self._clients[os.getpid()]


shared_client = _Shared().get
"""The client of this process."""


def _parse_commit(model: str, listing: Any) -> Commit:
    entries = {entry["rfilename"]: entry for entry in listing["siblings"]}
    files = {}
    for name in sorted(filter_repo_objects(entries, allow_patterns=list(FILES))):
        lfs = entries[name].get("lfs")
        content = f"sha256:{lfs['sha256']}" if lfs else f"git:{entries[name]['blobId']}"
        files[name] = HubFile(name, int(entries[name]["size"]), content)
    if not _COMMIT.fullmatch(listing["sha"]):
        raise ValueError(f"the commit {listing['sha']!r}")
    return Commit(model, listing["sha"], files)


async def _read_json(answer: aiohttp.ClientResponse) -> Any:
    body = await answer.read()
    try:
        return json.loads(body)
    except ValueError as error:
        raise TransientError(f"a response that is not JSON: {body[:80]!r}") from error


async def _refusal(answer: aiohttp.ClientResponse) -> Exception:
    if answer.ok:
        return _RefusedError(answer.status, "", "the whole file was sent in response to a range request")
    body = await answer.read()
    message = answer.headers.get("X-Error-Message") or answer.reason or body[:200].decode(errors="replace")
    message = message.strip().rstrip(".") or "no reason given"
    if answer.status in RETRIED_STATUSES:
        reset = _RESET.search(answer.headers.get("RateLimit", ""))
        wait = retry_after(answer.headers.get("Retry-After") or (reset and reset[1]))
        return TransientError(f"{message} (HTTP {answer.status})", wait)
    code = answer.headers.get("X-Error-Code", "")
    if answer.status == 401 and not code and "Invalid credentials" not in message:
        code = "RepoNotFound"  # the hub asks for a token where there is no such model, as huggingface_hub knows
    return _RefusedError(answer.status, code, message)
