"""From a request's bytes to the body that a route takes, at a bounded cost and, where it may be long, off the loop.

What a text would build is bounded before it is parsed (`json_bounds`), validation ends at the first error, and no more
than two long bodies are read at a time: threads that make objects of them compete with the event loop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_type_hints

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import ValidationError

from podquant.server.errors import ApiError
from podquant.server.fields import Body
from podquant.server.json_bounds import JsonBoundsError, ValuesLeft, check_bounds
from podquant.server.service import service_of

_SHORT_BODY = 1 << 14
"""Bytes up to which a body is read on the event loop: some milliseconds at the worst."""

_READERS = ThreadPoolExecutor(2, "bodies")

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class BodyRoute(APIRoute):
    """A route whose endpoint takes JSON as a parameter `body`, one of `schemas`; FastAPI documents, this reads it."""

    def get_route_handler(self) -> _Handler:
        """FastAPI's handler, given a body that is read already."""
        kind: type[Body] | None = get_type_hints(self.endpoint).get("body")
        handle: _Handler = super().get_route_handler()
        if kind is None:
            return handle

        async def read_and_handle(request: Request) -> Response:
            engine = service_of(request).engine
            longest = 0 if engine is None else engine.limits.longest
            _require_json(request)
            text = b"".join([piece async for piece in request.stream() if piece])  # `body` would copy the one there is
            if len(text) <= _SHORT_BODY:
                body = read(text, kind, longest)
            else:
                loop = asyncio.get_running_loop()
                body = await loop.run_in_executor(_READERS, read, text, kind, longest)
            return await handle(_ReadRequest(request, body))

        return read_and_handle


class _ReadRequest(Request):
    """A request whose JSON is the body that was made of it, as which pydantic takes it."""

    def __init__(self, request: Request, body: Body) -> None:
        super().__init__(request.scope, request.receive)
        self._read = body

    async def body(self) -> bytes:
        return b"{}"

    async def json(self) -> Body:
        return self._read


def read[B: Body](text: bytes, kind: type[B], longest: int) -> B:
    """The body in a text.

    Args:
        longest: tokens that the model takes, of which a body may hold the ids of so many.

    Raises:
        ApiError: the text is not JSON, or holds too much.
        RequestValidationError: with the first thing that is wrong.
    """
    if not text:
        raise ApiError(400, "The body is empty: expected a JSON object.", code="invalid_json")
    try:
        most = max(kind.MOST_VALUES, longest if kind.TAKES_IDS else 0)
        left = ValuesLeft(most - check_bounds(text, most))
        return kind.model_validate(json.loads(text.decode()), context=left)
    except JsonBoundsError as error:
        raise ApiError(
            413, f"The body holds {error}; send less, or several requests.", code="request_too_large"
        ) from None
    except json.JSONDecodeError as error:
        raise ApiError(
            400, f"The body is not valid JSON: {error.msg} (character {error.pos}).", code="invalid_json"
        ) from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not UTF-8 (byte {error.start}).", code="invalid_json") from None
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from None


def _require_json(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(
            400, "The body must be a JSON object, sent as Content-Type: application/json.", code="invalid_value"
        )
