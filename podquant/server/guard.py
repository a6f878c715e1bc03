"""What every request passes before a route sees it, the API key and a bound on the body, and what ends it wherever it
is then: that its client has gone. Plain ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from podquant.server.errors import ApiError, response_for

_OPEN_TO_ALL = frozenset({"/health", "/ready", "/metrics"})

BODY_SECONDS = 30.0
"""How long a body may take at the least, and how much longer for each so many bytes of it."""

_BODY_RATE = 1 << 14

_LINGER_SECONDS = 30.0
"""How long what a client still sends is read and dropped once it has its answer, so that it gets to read it: many send
their whole body first, and a connection closed under them is all that they would see."""


class Guard:
    """Lets a request through, with its whole body, or answers it.

    Args:
        app: what it guards.
        api_key: compared in constant time with the bearer token of everything but /health, /ready and /metrics.
        max_body_bytes: a longer body is refused with 413, announced or not.
        body_seconds: a body that takes longer, and comes slower than 16 KiB/s on the whole, is refused with 408.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int, body_seconds: float = BODY_SECONDS
    ) -> None:
        self._app = app
        self._key_digest = _digest(api_key) if api_key is not None else None
        self._max_body_bytes = max_body_bytes
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, Headers(scope=scope))
        try:
            self._check_key(scope["path"], body.headers)
            await body.read(self._max_body_bytes, self._body_seconds)
        except ApiError as error:
            is_slow = error.status == 408  # it would not come to an end in any other time either
            await response_for(error)(scope, receive, send if is_slow else body.lingering(send))
        else:
            await self._answer(scope, body, send)

    async def _answer(self, scope: Scope, body: _Body, send: Send) -> None:
        """Run the app until it has answered or the client has gone: then nothing more is done for it."""
        work = asyncio.ensure_future(self._app(scope, body.replay, send))
        leave = asyncio.ensure_future(body.leave())
        try:
            await asyncio.wait((work, leave), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leave.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait((work,))
        if not work.cancelled():
            work.result()

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key_digest is None or path in _OPEN_TO_ALL:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        # digests, so that not even the length shows in the time
        if kind.lower() != "bearer" or not hmac.compare_digest(_digest(key.strip()), self._key_digest):
            raise ApiError(
                401,
                "Expected the header `Authorization: Bearer KEY` with this server's API key; "
                + ("the key is wrong." if key else "there is none."),
                code="invalid_api_key",
            )


class _Body:
    """The body of one request: read whole, within a bound; or dropped after the answer."""

    def __init__(self, receive: Receive, headers: Headers) -> None:
        self.headers = headers
        self._receive = receive
        self._gone = asyncio.Event()
        self._is_whole = "content-length" not in headers and "transfer-encoding" not in headers
        self._pending: Message | None = {"type": "http.request", "body": b"", "more_body": False}

    async def read(self, most: int, seconds: float) -> None:
        """Raises ApiError if it is longer than `most` bytes, at once where its length is announced, or comes slowly."""
        if int(self.headers.get("content-length", "0")) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(seconds) as deadline:
                await self._read(most, deadline)
        except TimeoutError:
            raise ApiError(408, "The body took too long to come; send it faster.", code="request_timeout") from None

    async def _read(self, most: int, deadline: asyncio.Timeout) -> None:
        first = deadline.when()
        assert first is not None
        pieces: list[bytes] = []
        num_bytes = 0
        while not self._is_whole:
            message = await self._receive()
            if message["type"] != "http.request":
                self._gone.set()
                break
            pieces.append(message.get("body", b""))
            num_bytes += len(pieces[-1])
            deadline.reschedule(first + num_bytes / _BODY_RATE)
            self._is_whole = not message.get("more_body", False)
            if num_bytes > most:
                raise _too_large(most)
        self._pending = {"type": "http.request", "body": b"".join(pieces), "more_body": False}

    async def replay(self) -> Message:
        """ASGI's `receive` for whoever comes after: the whole body, then that the client has gone, once it has."""
        message, self._pending = self._pending, None
        if message is not None:
            return message
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def leave(self) -> None:
        """Returns once the client has gone; begin it when the whole body is there, once."""
        while not self._gone.is_set():
            if (await self._receive())["type"] == "http.disconnect":
                self._gone.set()

    def lingering(self, send: Send) -> Send:
        """ASGI's `send` that ends a response only once the client has sent all, or has had its time."""

        async def lingering_send(message: Message) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if is_last and not self._is_whole and not self._waits_for_leave():
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LINGER_SECONDS):
                        await self._drop()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        return lingering_send

    def _waits_for_leave(self) -> bool:
        """Whether the client sends nothing before it is told to, which to read on would do."""
        return self.headers.get("expect", "").lower() == "100-continue"

    async def _drop(self) -> None:
        while not self._is_whole:
            message = await self._receive()
            self._is_whole = message["type"] != "http.request" or not message.get("more_body", False)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body is longer than {most} bytes; send less.", code="request_too_large")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
