"""Which failures are retried, when, and for how long. Knows nothing of the operations.

Waits grow exponentially and are drawn at random, so that hosts refused together do not retry together; a server that
says when to come back (`Retry-After`) is not asked sooner.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses that are retried; every other status from 400 on is final."""


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds."""

    connect: float = 10.0
    """For a connection to be made."""
    silence: float = 30.0
    """For the next byte, once connected."""
    deadline: float = 120.0
    """For one operation, with all attempts and waits."""
    first_wait: float = 0.5
    longest_wait: float = 20.0

    def within(self, seconds: float) -> Patience:
        """The same, but an operation ends after `seconds` at the latest."""
        return replace(self, deadline=min(self.deadline, seconds))

    def wait_after(self, tries: int, retry_after: float | None) -> float:
        """Seconds to wait after that many failed attempts: half to all of a bound that doubles each time."""
        bound = min(self.longest_wait, self.first_wait * 2.0 ** min(tries - 1, 30))
        return max(bound * random.uniform(0.5, 1.0), retry_after or 0.0)


class TransientError(Exception):
    """An attempt failed in a way that may pass. `retry_after`: seconds the server asked to wait, if it did."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class GaveUpError(Exception):
    """The deadline passed, or would before the next attempt; says how many there were and why the last one failed."""


async def retried[T](attempt: Callable[[], Awaitable[T]], patience: Patience) -> T:
    """The result of the first `attempt` that does not raise `TransientError`.

    Raises:
        GaveUpError: the deadline passed.
    """
    started = time.monotonic()
    failure = "no answer"
    for tries in itertools.count(1):
        try:
            async with asyncio.timeout(started + patience.deadline - time.monotonic()) as scope:
                return await attempt()
        except TransientError as error:
            failure = str(error)
            wait = patience.wait_after(tries, error.retry_after)
        except TimeoutError:
            if not scope.expired():
                raise
            wait = patience.deadline
        elapsed = time.monotonic() - started
        if elapsed + wait >= patience.deadline:
            count = f"{tries} tries" if tries > 1 else "1 try"
            raise GaveUpError(f"gave up after {count} in {elapsed:.1f} s; the last one: {failure}")
        await asyncio.sleep(wait)
    raise AssertionError("unreachable")
