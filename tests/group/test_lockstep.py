"""How ranks meet on the step channel, and that what is announced is what others hear."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from podquant.engine.programs import Bucket
from podquant.errors import ClusterError, ConfigError
from podquant.group.launch import Deadlines, new_nonce, step_key
from podquant.group.lockstep import Announcer, follow, gather, join
from podquant.group.wire import Connection, Listener, WireError

SECRET = b"of the group"
PRINTS = {"weights": "w" * 64, "config": "c" * 64, "code": "k" * 64}
DEADLINES = Deadlines(liveness=1.0)


class Results(list[Any]):
    """What threads found, errors included."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> threading.Thread:
        def work() -> None:
            try:
                self.append(function(*arguments))
            except ClusterError as error:
                self.append(error)
            except ConfigError as error:
                self.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        return thread


def test_ranks_meet_whatever_strangers_do_meanwhile() -> None:
    key, stale = step_key(SECRET, new_nonce()), step_key(SECRET, new_nonce())
    joined, strangers = Results(), Results()
    with closing(Listener("127.0.0.1", 0)) as listener:
        address = ("127.0.0.1", listener.port)
        silent = socket.create_connection(address)
        threads = [
            strangers.run(join, address, stale, 1, PRINTS, 5.0),
            joined.run(join, address, key, 2, PRINTS, 5.0),
            joined.run(join, address, key, 1, PRINTS, 5.0),
        ]
        begin = time.monotonic()
        met = gather(listener, key, PRINTS, 3, 10.0)
        assert time.monotonic() - begin < 5
        for thread in threads:
            thread.join()
        silent.close()
    assert isinstance(strangers[0], WireError)
    assert "does not know this group's secret" in str(strangers[0])
    announcer = Announcer(met, DEADLINES)
    ints = np.pad(np.arange(6, dtype=np.int32).reshape(1, 6), ((0, 1), (0, 100)))
    floats, tokens = np.ones((2, 3), np.float32), np.full((2, 32), 7, np.int32)
    steps = [(Bucket(2, 32, scores=True), [ints, floats, tokens, tokens]), (Bucket(2, 1), [ints * 0, floats])]
    for bucket, arrays in steps:
        announcer.announce(bucket, arrays)
    announcer.end()
    expected = [(bucket, [array.tolist() for array in arrays]) for bucket, arrays in steps]
    for connection in joined:
        executor = Recorder()
        follow(executor, connection, DEADLINES, lambda since: None)  # type: ignore[arg-type]
        assert executor.ran == expected
    for connection in (*joined, *met):
        connection.close()


@pytest.mark.parametrize("what", list(PRINTS))
def test_a_rank_with_something_else_refuses_to_join_and_says_what(what: str) -> None:
    key, joined = step_key(SECRET, new_nonce()), Results()
    with closing(Listener("127.0.0.1", 0)) as listener:
        thread = joined.run(join, ("127.0.0.1", listener.port), key, 1, PRINTS | {what: "another"}, 5.0)
        here = PRINTS[what][:12]
        message = rf"rank 1 refuses to join: it does not have rank 0's {what} \(there another, here {here}\)"
        with pytest.raises(ConfigError, match=message):
            gather(listener, key, PRINTS, 2, 5.0)
        thread.join()
    assert isinstance(joined[0], ConfigError)
    assert f"rank 0's {what}" in str(joined[0])


def test_a_rank_that_does_not_come_is_named() -> None:
    key, joined = step_key(SECRET, new_nonce()), Results()
    with closing(Listener("127.0.0.1", 0)) as listener:
        thread = joined.run(join, ("127.0.0.1", listener.port), key, 1, PRINTS, 5.0)
        with pytest.raises(ClusterError, match=r"rank 2 has not come to the step channel within 0\.5 s"):
            gather(listener, key, PRINTS, 3, 0.5)
        thread.join()
    joined[0].close()


class Recorder:
    """An executor that notes what it is told to run."""

    def __init__(self) -> None:
        self.ran: list[tuple[Bucket, list[list[int]]]] = []

    def run(self, bucket: Bucket, arrays: Any) -> Any:
        self.ran.append((bucket, [array.tolist() for array in arrays]))
        return SimpleNamespace(tokens=jnp.zeros(1)), None


def pair() -> tuple[Connection, Connection]:
    left, right = socket.socketpair()
    ends = Results()
    thread = ends.run(lambda: Connection(left, SECRET, is_server=True))
    client = Connection(right, SECRET, is_server=False)
    thread.join()
    return ends[0], client


def test_a_follower_notices_a_step_that_is_missing_and_a_leader_that_is_silent() -> None:
    leader, follower = pair()
    with leader, follower:
        leader.send({"step": 2, "batch": 1, "length": 1, "scores": False})
        with pytest.raises(WireError, match="announced step 2, expected 1"):
            follow(Recorder(), follower, DEADLINES, lambda since: None)  # type: ignore[arg-type]
    leader, follower = pair()
    begin = time.monotonic()
    with leader, follower, pytest.raises(WireError, match="no answer in time"):
        follow(Recorder(), follower, Deadlines(liveness=0.2), lambda since: None)  # type: ignore[arg-type]
    assert time.monotonic() - begin < 2
