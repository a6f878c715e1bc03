"""What reading over HTTP needs, whatever the server: an event loop in a thread, ranges that go straight into the
caller's memory and resume where a connection dropped, and when a server that refuses wants to be asked again.
"""

from __future__ import annotations

import asyncio
import email.utils
import threading
import time
from collections.abc import Coroutine, Iterable
from concurrent.futures import Future
from typing import Any

import aiohttp

from podquant.storage.retry import TransientError


class LoopThread:
    """An event loop that runs coroutines for callers in any thread. `close()` ends it."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run[T](self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, run in this thread."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def start[T](self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `work` in this thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancel all work, then end the thread."""
        if self._thread.is_alive():
            self.run(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class RangeRead:
    """Bytes of a file from `offset` on, read into `view` by as many requests as it takes.

    A response about a file of another size than `size` is rejected; None accepts any.
    """

    def __init__(self, view: memoryview, offset: int, size: int | None = None) -> None:
        self._view = view
        self._offset = offset
        self._size = size
        self._done = 0

    def headers(self) -> dict[str, str]:
        """Headers that request the bytes still missing."""
        return {"Range": f"bytes={self._offset + self._done}-{self._offset + len(self._view) - 1}"}

    async def take(self, answer: aiohttp.ClientResponse) -> None:
        """Read the body of a partial response (206); `TransientError` if its range differs or it is cut short."""
        wanted = self._offset + self._done, self._offset + len(self._view)
        start, stop, size = _content_range(answer)
        if (start, stop) != wanted:
            raise TransientError(f"asked for bytes {wanted[0]:,} to {wanted[1]:,}, got {start:,} to {stop:,}")
        if self._size is not None and size not in (str(self._size), "*"):
            raise TransientError(f"expected a file of {self._size:,} bytes, got a range of one of {size}")
        async for chunk in answer.content.iter_any():
            if self._done + len(chunk) > len(self._view):
                raise TransientError(f"more bytes than the {stop - start:,} announced")
            self._view[self._done : self._done + len(chunk)] = chunk
            self._done += len(chunk)
        if self._done < len(self._view):
            raise TransientError(f"the response ended at byte {self._offset + self._done:,} of {stop:,}")


def _content_range(answer: aiohttp.ClientResponse) -> tuple[int, int, str]:
    """First byte and byte after the last of a partial response, and the size of the whole file or "*"."""
    text = answer.headers.get("Content-Range", "")
    part, _, size = text.removeprefix("bytes ").partition("/")
    first, _, last = part.partition("-")
    if not (first.isdigit() and last.isdigit()):
        raise TransientError(f"a response without its range (Content-Range: {text!r})")
    return int(first), int(last) + 1, size


async def gathered[T](works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, run concurrently. Returns, or raises, only when none of them writes to memory any more."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def dropped(error: Exception) -> TransientError:
    """A connection that broke."""
    return TransientError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def retry_after(value: str | None) -> float | None:
    """Seconds from now; the header `Retry-After` holds seconds or a date."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
