"""What is tried again, how soon, and how the last failure is told."""

from __future__ import annotations

import asyncio
import time

import pytest

from podquant.storage.retry import GaveUpError, Patience, TransientError, retried

FAST = Patience(deadline=0.2, first_wait=0.01, longest_wait=0.02)


def test_waits_double_up_to_a_bound_and_are_random() -> None:
    patience = Patience(first_wait=0.5, longest_wait=20.0)
    for tries, bound in ((1, 0.5), (2, 1.0), (3, 2.0), (7, 20.0), (4000, 20.0)):
        waits = {patience.wait_after(tries, None) for _ in range(50)}
        assert len(waits) > 1
        assert bound / 2 <= min(waits) <= max(waits) <= bound


def test_a_server_that_names_a_time_is_not_asked_sooner() -> None:
    assert Patience().wait_after(1, 7.0) == 7.0
    assert Patience(first_wait=100.0, longest_wait=100.0).wait_after(1, 7.0) >= 50.0


def test_the_first_success_counts() -> None:
    tries = []

    async def attempt() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise TransientError("not yet")
        return len(tries)

    assert asyncio.run(retried(attempt, FAST)) == 3


def test_other_errors_are_final() -> None:
    async def attempt() -> None:
        tries.append(1)
        raise KeyError("final")

    tries: list[int] = []
    with pytest.raises(KeyError):
        asyncio.run(retried(attempt, FAST))
    assert len(tries) == 1


def test_the_deadline_ends_the_tries_and_tells_the_last_failure() -> None:
    async def attempt() -> None:
        raise TransientError("HTTP 503")

    with pytest.raises(GaveUpError, match=r"gave up after \d+ tries in \d+\.\d s; the last one: HTTP 503"):
        asyncio.run(retried(attempt, FAST))


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    async def attempt() -> None:
        raise TransientError("busy", retry_after=60.0)

    started = time.monotonic()
    with pytest.raises(GaveUpError, match=r"gave up after 1 try in \d+\.\d s; the last one: busy"):
        asyncio.run(retried(attempt, FAST))
    assert time.monotonic() - started < 30  # it was told to wait for 60


def test_the_deadline_ends_a_try_that_hangs() -> None:
    with pytest.raises(GaveUpError, match=r"gave up after 1 try in \d+\.\d s; the last one: no answer"):
        asyncio.run(retried(lambda: asyncio.sleep(60), FAST))


def test_a_timeout_inside_a_try_is_its_own_error() -> None:
    async def attempt() -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        asyncio.run(retried(attempt, FAST))
