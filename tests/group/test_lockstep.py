"""How ranks meet on the step channel, and that what is announced is what others hear."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from podquant.checkpoint.fingerprint import Fingerprint
from podquant.engine.options import EngineOptions
from podquant.engine.programs import NUM_INTS, Bucket, Floats, Inputs, pad_inputs
from podquant.errors import ClusterError, ConfigError
from podquant.group.fingerprint import Fingerprints, fingerprints
from podquant.group.launch import Deadlines, new_nonce, step_key
from podquant.group.lockstep import Follower, Leader, StepBroadcaster, accept_ranks, follow, join
from podquant.group.messages import FROM_RANK, TO_RANK, RankHello, Step, Welcome
from podquant.group.wire import Connection, PeerListener, WireError
from podquant.model.layout import CacheShape
from podquant.weights.source import open_source
from tests.storage.kinds import KINDS, fine_tune, storage

LLAMA = Path(__file__).parents[1] / "data" / "goldens" / "llama"

SECRET = b"of the group"
PRINTS = Fingerprints(Fingerprint("w" * 64, "samples"), "c" * 64, "k" * 64)
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
    with closing(PeerListener("127.0.0.1", 0)) as listener:
        address = ("127.0.0.1", listener.port)
        silent = socket.create_connection(address)
        threads = [
            strangers.run(join, address, stale, 1, PRINTS, 5.0),
            joined.run(join, address, key, 2, PRINTS, 5.0),
            joined.run(join, address, key, 1, PRINTS, 5.0),
        ]
        begin = time.monotonic()
        met = accept_ranks(listener, key, PRINTS, 3, 10.0)
        assert time.monotonic() - begin < 9  # it did not wait for the silent one
        for thread in threads:
            thread.join()
        silent.close()
    assert isinstance(strangers[0], WireError)
    assert "does not know this group's secret" in str(strangers[0])
    broadcaster = StepBroadcaster(met, DEADLINES)
    rows, floats = np.full((1, NUM_INTS + 2), 3, np.int32), np.ones((1, len(Floats._fields)), np.float32)
    tokens, ends = np.full(32, 7, np.int32), np.zeros((0, 2), np.int32)
    steps = [
        (Bucket(32, scores=True), Inputs(rows, floats, tokens, ends, tokens)),
        (Bucket(2), Inputs(rows, floats, tokens[:1], ends)),
    ]
    for bucket, inputs in steps:
        broadcaster.broadcast(bucket, inputs)
    broadcaster.end()
    expected = [(bucket, as_lists(inputs)) for bucket, inputs in steps]
    for connection in joined:
        executor = Recorder()
        follow(executor, connection, DEADLINES, lambda since: None)  # type: ignore[arg-type]
        assert executor.ran == expected
    for connection in (*joined, *met):
        connection.close()


def refused(theirs: Fingerprints, here: Fingerprints) -> str:
    """What rank 1 is told, as rank 0 tells whoever started it."""
    key, joined = step_key(SECRET, new_nonce()), Results()
    with closing(PeerListener("127.0.0.1", 0)) as listener:
        thread = joined.run(join, ("127.0.0.1", listener.port), key, 1, theirs, 5.0)
        with pytest.raises(ConfigError) as caught:
            accept_ranks(listener, key, here, 2, 5.0)
        thread.join()
    assert isinstance(joined[0], ConfigError)
    assert str(joined[0]) == str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (replace(PRINTS, weights=Fingerprint("x" * 64, "samples")), "weights differ from rank 0's (there x, here w)"),
        (
            replace(PRINTS, weights=Fingerprint("w" * 64, "crc32c")),
            "weights cannot be compared with rank 0's: they are known there by crc32c, here by samples, because they "
            "lie in different kinds of storage",
        ),
        (replace(PRINTS, config="x" * 64), "config differs from rank 0's (there x, here c)"),
        (
            replace(PRINTS, config="x" * 64, code="y" * 64),
            "config differs from rank 0's (there x, here c); its code differs from rank 0's (there y, here k)",
        ),
    ],
)
def test_a_rank_with_something_else_is_refused_and_hears_why(theirs: Fingerprints, message: str) -> None:
    for letter in "wxcyk":
        message = message.replace(f" {letter},", f" {letter * 12},").replace(f" {letter})", f" {letter * 12})")
    expected = f"rank 1 refused: its {message}. Give all hosts the same model, flags and podquant"
    assert refused(theirs, PRINTS) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_with_another_fine_tune_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same model: names, sizes, headers and config.json are equal."""
    other = fine_tune(LLAMA, tmp_path / "other")
    options = EngineOptions("where each host has it", device="cpu")

    def prints(uri: str) -> Fingerprints:
        with closing(open_source(uri)) as source:
            return fingerprints(source, options)

    with storage(kind, tmp_path / "stored", monkeypatch) as put:
        here, same, theirs = (prints(put(*each)) for each in ((LLAMA, "one"), (LLAMA, "copy"), (other, "two")))
    assert here == same
    assert refused(theirs, here).startswith("rank 1 refused: its weights differ from rank 0's (there ")
    assert (theirs.config, theirs.code) == (here.config, here.code)


def test_a_rank_that_does_not_come_is_named() -> None:
    key, joined = step_key(SECRET, new_nonce()), Results()
    with closing(PeerListener("127.0.0.1", 0)) as listener:
        thread = joined.run(join, ("127.0.0.1", listener.port), key, 1, PRINTS, 5.0)
        with pytest.raises(ClusterError, match=r"rank 2 has not come to the step channel within 0\.5 s"):
            accept_ranks(listener, key, PRINTS, 3, 0.5)
        thread.join()
    joined[0].close()


def as_lists(inputs: Inputs) -> list[Any]:
    return [None if array is None else array.tolist() for array in inputs]


class Recorder:
    """An executor that notes what it is told to run."""

    def __init__(self) -> None:
        self.ran: list[tuple[Bucket, list[Any]]] = []

    def run(self, bucket: Bucket, inputs: Inputs) -> Any:
        pad_inputs(inputs, bucket, CacheShape(9, 16, 4, 256))
        self.ran.append((bucket, as_lists(inputs)))
        return SimpleNamespace(tokens=jnp.zeros(1)), None


def pair() -> tuple[Follower, Leader]:
    """Rank 0's end and that of another rank."""
    left, right = socket.socketpair()
    ends = Results()
    thread = ends.run(lambda: Connection(left, FROM_RANK, SECRET, is_server=True))
    client = Connection(right, TO_RANK, SECRET)
    thread.join()
    return ends[0], client


def step(number: int, *arrays: Any) -> Step:
    return Step(number, num_tokens=1, scores=False, arrays=arrays)


INTS = np.zeros((1, 4), np.int32)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (step(2, INTS), "broadcast step 2, expected 1"),
        (step(1), "broadcast step 1 with 0 arrays, expected 4"),
        (step(1, *[INTS] * 5), "broadcast step 1 with 5 arrays, expected 4"),
        (step(1, *[INTS[0]] * 4), "broadcast step 1 cannot be run: .* argument 2 is shorter"),
        (Welcome(), "did not expect the message Welcome now"),
        (RankHello(1, PRINTS), "malformed message: message 'RankHello': unknown here"),
    ],
)
def test_a_follower_refuses_what_is_no_next_step(message: object, error: str) -> None:
    leader, follower = pair()
    executor = Recorder()
    with leader, follower:
        leader.send(message)
        with pytest.raises(WireError, match=error):
            follow(executor, follower, DEADLINES, lambda since: None)  # type: ignore[arg-type]
    assert executor.ran == []


def test_a_follower_notices_a_leader_that_is_silent() -> None:
    leader, follower = pair()
    begin = time.monotonic()
    with leader, follower, pytest.raises(WireError, match="no answer in time"):
        follow(Recorder(), follower, Deadlines(liveness=0.2), lambda since: None)  # type: ignore[arg-type]
    assert time.monotonic() - begin < 20  # and not 60


def test_heartbeats_keep_a_follower_while_there_is_no_step() -> None:
    leader, follower = pair()
    quick = Deadlines(liveness=0.3)
    results = Results()
    with leader, follower:
        broadcaster = StepBroadcaster([leader], quick)
        thread = results.run(follow, Recorder(), follower, quick, lambda since: None)
        thread.join(1.5)
        assert thread.is_alive()
        broadcaster.end()
        thread.join(5)
    assert results == [None]
