"""Server-sent events: bytes of JSON, and the response that writes them as they come.

A chunk that only adds text is bytes around one JSON string; everything else of it is known before the first token. On
two cores the JSON of a token competes with the computing of the next one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from json.encoder import encode_basestring_ascii as json_string
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from podquant.engine.request import Output
from podquant.errors import RequestError
from podquant.server.errors import error_body
from podquant.server.generation import Generation
from podquant.server.off_loop import off_loop

DONE = b"data: [DONE]\n\n"

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Chunks(Protocol):
    """How a route writes its chunks."""

    def chunk(self, index: int, output: Output) -> bytes:
        """Events for one piece of news; b"" if it holds nothing to show."""

    def end(self) -> bytes:
        """Events after the last sequence has ended, without `[DONE]`."""


class Template:
    """An event that is the same but for one string: `Template(value).fill(text)`; the string stands as `HOLE`."""

    HOLE = "\x00hole\x00"

    def __init__(self, value: dict[str, Any]) -> None:
        self._head, self._tail = event(value).split(json_string(self.HOLE).encode())

    def fill(self, text: str) -> bytes:
        """The event with this text."""
        return self._head + json_string(text).encode() + self._tail


def event(value: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


class EventStream(Response):
    """Runs a generation and streams it.

    What the engine refuses at once is raised before anything is sent, so that it gets its proper status.
    """

    def __init__(self, generation: Generation, chunks: Chunks) -> None:
        self.background = None
        self._generation = generation
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._generation as generation:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            try:
                async for batch in generation.news():
                    scored = sum(len(output.prompt_logprobs) for _, output in batch)
                    data = await off_loop(scored, partial(self._write, batch))
                    if data:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                last = self._chunks.end()
            except RequestError as error:
                last = event(error_body(503, str(error), code="unavailable"))
            await send({"type": "http.response.body", "body": last + DONE})

    def _write(self, batch: Sequence[tuple[int, Output]]) -> bytes:
        return b"".join([self._chunks.chunk(index, output) for index, output in batch])
