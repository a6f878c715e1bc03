"""The lock in a bucket: one holder, found dead by the store's clock, and never two."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from podquant.errors import StorageError
from podquant.storage.gcs.client import GcsClient
from podquant.storage.gcs.lock import GcsLock
from podquant.storage.gcs.objects import Bucket
from tests.storage.gcs.emulator import GcsEmulator

PLACE = "gs://b/out"


@pytest.fixture
def bucket(client: GcsClient) -> Bucket:
    return Bucket(client, "b")


def test_a_second_holder_is_refused_and_told_who_holds_it(emulator: GcsEmulator, bucket: Bucket) -> None:
    first, second = (GcsLock(bucket, "out.lock", lease_seconds=3.0) for _ in range(2))
    first.acquire(PLACE)
    who = re.escape(f"{PLACE}: process {os.getpid()} on host {socket.gethostname()} (since 20")
    with pytest.raises(StorageError, match=who + r".* is writing there\. Wait until"):
        second.acquire(PLACE)
    first.check()
    first.release()
    assert emulator.data("b") == {}
    second.acquire(PLACE)
    second.release()
    assert emulator.data("b") == {}


@pytest.mark.slow
def test_a_live_holder_is_never_taken_for_dead(bucket: Bucket) -> None:
    first, second = (GcsLock(bucket, "out.lock", lease_seconds=2.0) for _ in range(2))
    first.acquire(PLACE)
    time.sleep(3.2)
    with pytest.raises(StorageError, match="is writing there"):
        second.acquire(PLACE)
    first.check()
    first.release()


def test_of_many_exactly_one_takes_over_a_dead_holders_lock(emulator: GcsEmulator, bucket: Bucket) -> None:
    emulator.put("b", "out.lock", b"", {"podquant-lock": "another job"}, age=6.0)
    locks = [GcsLock(bucket, "out.lock", lease_seconds=5.0) for _ in range(8)]
    barrier = threading.Barrier(8)

    def take(lock: GcsLock) -> bool:
        barrier.wait()
        try:
            lock.acquire(PLACE)
        except StorageError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(take, locks))
    assert sum(taken) == 1
    for lock in locks:
        lock.release()
    assert emulator.data("b") == {}


@pytest.mark.slow
def test_a_lock_is_waited_for_until_its_lease_ends(
    emulator: GcsEmulator, bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    emulator.put("b", "out.lock", b"", {"podquant-lock": "another job"}, age=28.0)
    lock = GcsLock(bucket, "out.lock")
    begin = time.monotonic()
    lock.acquire(PLACE)
    assert time.monotonic() - begin > 1.0
    assert f"{PLACE}: locked by another job: waiting for a heartbeat" in caplog.text
    lock.release()
    assert emulator.data("b") == {}


def test_a_holder_learns_that_its_lock_was_taken_over_and_leaves_it_alone(
    emulator: GcsEmulator, bucket: Bucket
) -> None:
    lock = GcsLock(bucket, "out.lock")
    lock.acquire(PLACE)
    emulator.put("b", "out.lock", b"theirs")
    with pytest.raises(StorageError, match=r"gs://b/out.lock: this run lost its lock: .* Nothing was published"):
        lock.check()
    lock.release()
    assert emulator.data("b") == {"out.lock": b"theirs"}


@pytest.mark.parametrize("kind", ["lost", "status", "reset"])
def test_a_lost_answer_does_not_lose_the_lock(emulator: GcsEmulator, bucket: Bucket, kind: str) -> None:
    lock = GcsLock(bucket, "out.lock")
    emulator.fail(kind, "^POST ")
    lock.acquire(PLACE)
    emulator.fail(kind, "^POST ")
    lock.check()
    emulator.fail(kind, "^DELETE ")
    lock.release()
    assert emulator.data("b") == {}
    assert sum(fault.times for fault in emulator.faults) == 0


def test_a_lock_that_cannot_be_made_is_told(emulator: GcsEmulator, client: GcsClient, bucket: Bucket) -> None:
    emulator.fail("status", "^POST ", status=403, message="no")
    with pytest.raises(StorageError, match=r"gs://b/out.lock: cannot write: no \(HTTP 403\)\. Give this account"):
        GcsLock(bucket, "out.lock").acquire(PLACE)
    with pytest.raises(StorageError, match=r"gs://none/out.lock: cannot write: The specified bucket does not exist"):
        GcsLock(Bucket(client, "none"), "out.lock").acquire(PLACE)


def test_what_is_no_lock_of_podquants_is_left_alone(emulator: GcsEmulator, bucket: Bucket) -> None:
    emulator.put("b", "out.lock", b"the user's", age=1000.0)
    with pytest.raises(StorageError, match=r"gs://b/out\.lock: podquant needs this name for a lock .* did not write"):
        GcsLock(bucket, "out.lock").acquire(PLACE)
    assert emulator.data("b") == {"out.lock": b"the user's"}
