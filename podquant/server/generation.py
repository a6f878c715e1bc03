"""One HTTP request's way through the engine: submit its sequences, hear of them on the event loop, abort what is left.

News crosses from the engine's thread in batches: one wake-up of the loop carries whatever a step gave to everybody, and
one write to a socket whatever a request has heard since the last.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from podquant.engine.backend import Backend
from podquant.engine.request import FinishReason, Output, Request
from podquant.errors import EngineStoppedError, RequestError
from podquant.server.metrics import Metrics


class Mailbox:
    """Carries outputs from the engine's thread to the event loop, waking it once for all that is there."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._letters: deque[tuple[Generation, int, Output]] = deque()
        self._is_awake = False

    def post(self, generation: Generation, index: int, output: Output) -> None:
        """Called in the engine's thread."""
        self._letters.append((generation, index, output))
        if not self._is_awake:
            self._is_awake = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_awake = False  # first: what comes from here on wakes the loop again
        while self._letters:
            generation, index, output = self._letters.popleft()
            generation.hear(index, output)


class Generation:
    """The sequences of one HTTP request, as an async context: entering submits them, leaving aborts what still runs.

    Args:
        engine: runs them.
        mailbox: brings its outputs.
        metrics: told of every sequence.
        requests: the sequences.

    Raises, on entering, what `Backend.submit` raises; then none of the sequences runs.
    """

    def __init__(
        self,
        engine: Backend,
        mailbox: Mailbox,
        metrics: Metrics,
        requests: Sequence[Request],
    ) -> None:
        self._engine = engine
        self._mailbox = mailbox
        self._metrics = metrics
        self._requests = requests
        self._open = set(range(len(requests)))
        self._news: list[tuple[int, Output]] = []
        self._arrived = asyncio.Event()
        self._began = time.perf_counter()
        self._last_token: list[float | None] = [None] * len(requests)

    async def __aenter__(self) -> Self:
        try:
            for index, request in enumerate(self._requests):
                self._engine.submit(request, partial(self._mailbox.post, self, index))
        except RequestError:
            self._abort("refused")
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._abort("cancelled")

    def hear(self, index: int, output: Output) -> None:
        """Take news of one sequence, on the event loop."""
        self._news.append((index, output))
        self._arrived.set()

    async def news(self) -> AsyncIterator[list[tuple[int, Output]]]:
        """What has come since the last time, until every sequence has ended.

        Raises EngineStoppedError if the engine ended a sequence before its time.
        """
        while self._open:
            await self._arrived.wait()
            self._arrived.clear()
            batch, self._news = self._news, []
            now = time.perf_counter()
            for index, output in batch:
                self._measure(index, output, now)
            yield batch

    def _abort(self, outcome: str) -> None:
        if self._open:
            self._metrics.requests.labels(outcome).inc(len(self._open))
        for index in self._open:
            self._engine.abort(self._requests[index].id)
        self._open.clear()

    def _measure(self, index: int, output: Output, now: float) -> None:
        last = self._last_token[index]
        if last is None:
            self._metrics.first_token.observe(now - self._began)
            self._last_token[index] = now
        elif output.token_ids:
            self._metrics.between_tokens.observe(now - last)
            self._last_token[index] = now
        if output.finish_reason is None:
            return
        self._open.discard(index)
        self._metrics.requests.labels(output.finish_reason.value).inc()
        self._metrics.end_to_end.observe(now - self._began)
        if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            raise EngineStoppedError(f"The engine ended this request before its time: {output.error}.")
