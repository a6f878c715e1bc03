"""What every request passes before a route sees it: the API key, and a bound on the body. Plain ASGI."""

from __future__ import annotations

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from podquant.server.errors import ApiError, response_for

_OPEN_TO_ALL = frozenset({"/health", "/ready", "/metrics"})


class Guard:
    """Lets a request through or answers it.

    Args:
        app: what it guards.
        api_key: compared in constant time with the bearer token of everything but /health, /ready and /metrics.
        max_body_bytes: a longer body is refused with 413, announced or not.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._key_digest = _digest(api_key) if api_key is not None else None
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        num_bytes = 0

        async def bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        try:
            headers = Headers(scope=scope)
            self._check_key(scope["path"], headers)
            if int(headers.get("content-length", "0")) > self._max_body_bytes:
                raise self._too_large()
            await self._app(scope, bounded, send)
        except ApiError as error:  # a route's own errors are answered further in
            await response_for(error)(scope, receive, send)

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

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body is longer than {self._max_body_bytes} bytes; send less.", code="request_too_large"
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
