"""HTTP to Google Cloud Storage: one event loop in a thread, one session, retries, and errors with advice.

gcsfs finds the endpoint and the credentials, so `STORAGE_EMULATOR_HOST`, `FSSPEC_GCS_ENDPOINT_URL`, `FSSPEC_GCS_TOKEN`,
`GOOGLE_APPLICATION_CREDENTIALS` and a TPU VM's own account mean what its users expect. The requests are our own: gcsfs
(2026.10) ignores `Retry-After`, never checks a CRC32C, copies what it reads, and takes a lost response for a refusal.
Knows nothing of what objects hold.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import fsspec.config
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from podquant.errors import StorageError, TransientStorageError
from podquant.storage.http_reading import LoopThread, dropped, retry_after
from podquant.storage.retry import RETRIED_STATUSES, GaveUpError, Patience, TransientError, retried

# Before gcsfs is imported: its other file system asks for a bucket's type over gRPC, for a minute where none answers.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

from gcsfs.core import GCSFileSystem

_IN_FLIGHT = 16
_SEND_BYTES = 256 << 10
_READ_BUFFER = 1 << 20  # bytes; fewer wake-ups of the event loop than aiohttp's 64 KiB
_ADVICE: dict[int | None, str] = {
    None: "Check the network, the proxy and the endpoint (STORAGE_EMULATOR_HOST, FSSPEC_GCS_ENDPOINT_URL).",
    400: "This is a fault in podquant or in the endpoint: check STORAGE_EMULATOR_HOST and FSSPEC_GCS_ENDPOINT_URL.",
    401: "No valid credentials: run `gcloud auth application-default login`, set GOOGLE_APPLICATION_CREDENTIALS, or "
    "give the machine a service account.",
    403: "Give this account the role Storage Object User (to read only: Storage Object Viewer) on the bucket.",
    404: "Check the bucket and the path; a file may have been removed or changed since it was listed.",
    412: "It exists already, or another process changed it.",
}

Consume = Callable[[aiohttp.ClientResponse], Awaitable[Any]]
type Try = Callable[[], Awaitable[Any]]


class GcsError(StorageError):
    """The store refused. `status` is its HTTP status, None if it gave none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class GcsTransientError(GcsError, TransientStorageError):
    """The store did not answer within the deadline, or did not keep what it was sent."""


class _RefusedError(Exception):
    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(message)
        self.status = status


class GcsClient(LoopThread):
    """Sends requests for callers in any thread. One serves a whole process; `close()` ends its thread."""

    def __init__(self, patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        super().__init__("gcs")
        self._files = GCSFileSystem(asynchronous=True, loop=self._loop, skip_instance_cache=True, **_token())
        self.base = self._files.base.rstrip("/")  # …/storage/v1
        self.upload_base = self.base.replace("/storage/v1", "/upload/storage/v1")
        self._session: aiohttp.ClientSession | None = None
        self._has_answered = False
        self._slots = asyncio.Semaphore(_IN_FLIGHT)

    async def retry(self, action: str, place: str, attempt: Try, patience: Patience | None = None) -> Any:
        """What `attempt` returns, retried as long as `patience` allows; a `GcsError` names `action` and `place`."""
        try:
            return await retried(attempt, patience or self.patience)
        except _RefusedError as error:
            advice = _ADVICE.get(error.status, "Look this status up in the documentation of Cloud Storage.")
            status = "" if error.status is None else f" (HTTP {error.status})"
            raise GcsError(f"{place}: cannot {action}: {error}{status}. {advice}", error.status) from error
        except GaveUpError as error:
            advice = "Check the connection to the store and its quota, then run again."
            raise GcsTransientError(f"{place}: cannot {action}: {error}. {advice}") from error

    async def once(
        self,
        method: str,
        url: str,
        consume: Consume,
        *,
        query: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
        data: bytes | memoryview | None = None,
        accept: frozenset[int] = frozenset({200}),
    ) -> Any:
        """One request: what `consume` makes of an accepted response. Called by an `attempt` given to `retry`."""
        full = URL(f"{url}?{urlencode(query)}" if query else url, encoded=True)
        async with self._slots:
            try:
                sent = await self._with_credentials(headers or {})
                session = await self._connected()
                body = None if data is None else _Body(memoryview(data))
                async with session.request(method, full, headers=sent, data=body, allow_redirects=False) as answer:
                    self._has_answered = True
                    if answer.status in accept:
                        return await consume(answer)
                    raise await _refusal(answer)
            except aiohttp.ClientSSLError as error:
                raise _RefusedError(None, f"no secure connection: {error}") from error
            except aiohttp.ClientConnectorDNSError as error:
                if self._has_answered:  # the store has an address, so this lookup failure is temporary
                    raise dropped(error) from error
                raise _RefusedError(None, f"no address of {error.host}: {error.strerror}") from error
            except (aiohttp.ClientError, ConnectionError) as error:
                raise dropped(error) from error

    async def _with_credentials(self, headers: Mapping[str, str]) -> dict[str, str]:
        sent = {"Accept-Encoding": "identity", **headers}
        if self._files.credentials.credentials is not None:
            # A token about to expire is renewed by a blocking request.
            await asyncio.to_thread(self._files.credentials.apply, sent)
        return sent

    async def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            patience = self.patience
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=patience.connect, sock_read=patience.silence),
                connector=aiohttp.TCPConnector(limit=_IN_FLIGHT),
                read_bufsize=_READ_BUFFER,
                trust_env=True,
            )
        return self._session

    async def _end(self) -> None:
        await super()._end()
        if self._session is not None:
            await self._session.close()


class _Body(aiohttp.Payload):
    """Bytes sent in pieces, as the connection takes them, with other tasks' turns in between."""

    def __init__(self, data: memoryview) -> None:
        super().__init__(data, content_type="application/octet-stream")
        self._size = data.nbytes

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return str(self._value, encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        for start in range(0, len(self._value), _SEND_BYTES):
            await writer.write(self._value[start : start + _SEND_BYTES])


class _Shared:
    """The clients of this process, one per endpoint. A forked child gets its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[tuple[int, str], GcsClient] = {}

    def get(self) -> GcsClient:
        with self._lock:
            key = os.getpid(), _endpoint()
            if key not in self._clients:
                client = GcsClient()
                atexit.register(client.close)
                self._clients[key] = client
            return self._clients[key]


shared_client = _Shared().get
"""The client of this process for the endpoint that the environment names now."""


def object_url(base: str, bucket: str, name: str) -> str:
    """The address of an object under `base`."""
    return f"{bucket_url(base, bucket)}/o/{quote(name, safe='')}"


def bucket_url(base: str, bucket: str) -> str:
    """The address of a bucket under `base`."""
    return f"{base}/b/{quote(bucket, safe='')}"


async def read_json(answer: aiohttp.ClientResponse) -> Any:
    """A response's JSON; one cut short is worth a retry."""
    body = await answer.read()
    try:
        return json.loads(body)
    except ValueError as error:
        raise TransientError(f"a response that is not JSON: {body[:80]!r}") from error


def _settings() -> dict[str, str]:
    """What fsspec is configured to give gcsfs, by its files or by FSSPEC_GS_… and FSSPEC_GCS_…."""
    return {**fsspec.config.conf.get("gs", {}), **fsspec.config.conf.get("gcs", {})}


def _endpoint() -> str:
    """The endpoint set by the user; empty for Google's own."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    return str(_settings().get("endpoint_url") or ("" if emulator == "default" else emulator))


def _token() -> dict[str, str]:
    """Over plain HTTP no credentials are looked for or sent: emulators need none. Configured ones are respected."""
    is_plain = _endpoint() != "" and not _endpoint().startswith("https://")
    return {"token": "anon"} if is_plain and "token" not in _settings() else {}


async def _refusal(answer: aiohttp.ClientResponse) -> Exception:
    body = await answer.read()
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode(errors="replace").strip()
    message = (message or answer.reason or "no reason given").rstrip(".")
    if answer.status in RETRIED_STATUSES:
        return TransientError(f"{message} (HTTP {answer.status})", retry_after(answer.headers.get("Retry-After")))
    return _RefusedError(answer.status, message)
