from __future__ import annotations

import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from podquant.errors import StorageError
from podquant.storage.local.lock import Lock


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    first.acquire(tmp_path / "out")
    who = re.escape(f"{tmp_path}/out: process {os.getpid()} on host {socket.gethostname()} (since 20")
    with pytest.raises(StorageError, match=who + r".* is writing there\. Wait until it ends"):
        second.acquire(tmp_path / "out")
    first.release()
    second.acquire(tmp_path / "out")
    second.release()
    assert os.listdir(tmp_path) == []


def test_a_stale_file_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("process 1 on host gone " + "x" * 9000)
    lock = Lock(tmp_path / "lock")
    lock.acquire(tmp_path)
    assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} ")
    assert "xxx" not in (tmp_path / "lock").read_text()
    lock.release()


def test_never_two_holders_while_the_file_comes_and_goes(tmp_path: Path) -> None:
    held: list[int] = []
    most: list[int] = []

    def contend(_: int) -> int:
        taken = 0
        for _ in range(200):
            lock = Lock(tmp_path / "lock")
            try:
                lock.acquire(tmp_path)
            except StorageError:
                continue
            held.append(1)
            time.sleep(0.0002)
            most.append(len(held))
            held.pop()
            lock.release()
            taken += 1
        return taken

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(contend, range(8))) >= 8
    assert max(most) == 1
    assert os.listdir(tmp_path) == []


def test_a_lock_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no/lock: cannot lock: .*\(ENOENT\)"):
        Lock(tmp_path / "no" / "lock").acquire(tmp_path)
