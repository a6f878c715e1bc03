"""The step channel: rank 0 announces every step before it dispatches it, the other ranks run what they hear.

They meet first: each rank shows what it would compute with, and one that has other weights, another configuration or
other code is refused by name. Knows nothing of requests, or of who started these processes.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict

import jax
import numpy as np

from podquant.checkpoint.fingerprint import Fingerprint
from podquant.engine.executor import Executor
from podquant.engine.programs import Bucket
from podquant.errors import ClusterError, ConfigError
from podquant.group.fingerprint import Fingerprints, differences
from podquant.group.launch import Deadlines
from podquant.group.wire import Array, Connection, Listener, Message, WireError, connect, encode

_log = logging.getLogger(__name__)

_AHEAD = 1
"""Steps a follower dispatches beyond the one it waits for, as the engine does."""


class Announcer:
    """Rank 0's end: connections to all other ranks, which hear every step and, while there is none, a sign of life."""

    def __init__(self, followers: Sequence[Connection], deadlines: Deadlines) -> None:
        self._followers, self._deadlines = followers, deadlines
        self._num_steps = 0
        self._ended = threading.Event()
        if followers:
            threading.Thread(target=self._beat, name="announcer", daemon=True).start()

    def announce(self, bucket: Bucket, arrays: Sequence[Array]) -> None:
        """Tell all others of a step. Raises WireError if one is gone."""
        if not self._followers:
            return
        self._num_steps += 1
        ints, *others = arrays
        used = np.flatnonzero(ints.any(axis=0))  # page tables are as wide as the longest context, and seldom full
        body = {
            "step": self._num_steps,
            "batch": bucket.batch,
            "length": bucket.length,
            "scores": bucket.scores,
            "width": ints.shape[1],
        }
        payload = encode(body, [ints[:, : used[-1] + 1 if len(used) else 0], *others])
        for follower in self._followers:
            follower.send_encoded(payload, timeout=self._deadlines.liveness)

    def end(self) -> None:
        """Tell the others that no step follows."""
        self._ended.set()
        for follower in self._followers:
            try:
                follower.send({"end": True})
            except WireError as error:
                _log.warning("%s", error)

    def _beat(self) -> None:
        while not self._ended.wait(self._deadlines.beat):
            try:
                for follower in self._followers:
                    follower.send({"beat": True})
            except WireError as error:  # a step will find it too, or who watches this process
                _log.warning("%s", error)
                return


def gather(listener: Listener, key: bytes, prints: Fingerprints, num_ranks: int, deadline: float) -> list[Connection]:
    """As rank 0: the connections of ranks 1 and up, once all are there and have the same to compute with.

    Args:
        deadline: seconds to wait for them.

    Raises:
        ConfigError: a rank has other weights, configuration or code.
        ClusterError: not all have come in time; names who is missing.
    """
    end = time.monotonic() + deadline
    came: dict[int, Connection] = {}
    wrong: list[str] = []
    turn = threading.Lock()

    def welcome(caller: Connection) -> None:
        hello = caller.receive(timeout=max(0.1, end - time.monotonic())).body
        rank, theirs = hello["rank"], hello["fingerprints"]
        theirs = Fingerprints(Fingerprint(**theirs["weights"]), theirs["config"], theirs["code"])
        unlike = differences(theirs, prints, "rank 0's")
        with turn:
            if not isinstance(rank, int) or not 0 < rank < num_ranks or rank in came:
                caller.send({"refused": f"rank {rank} of {num_ranks} is taken, or is none"})
                caller.close()
            elif unlike:
                text = f"rank {rank} refused: {'; '.join(unlike)}"
                wrong.append(text)
                caller.send({"refused": text})
                caller.close()
            else:
                caller.send({"welcome": True})
                came[rank] = caller

    while len(came) < num_ranks - 1 and not wrong and time.monotonic() < end:
        peer = listener.accept(timeout=0.2)
        if peer is not None:
            threading.Thread(target=_guarded, args=(peer, key, welcome), daemon=True).start()
    with turn:
        if len(came) == num_ranks - 1:
            return [came[rank] for rank in range(1, num_ranks)]
        for caller in came.values():
            caller.close()
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}. Give all hosts the same model, flags and podquant")
    missing = ", ".join(str(rank) for rank in range(1, num_ranks) if rank not in came)
    raise ClusterError(f"rank {missing} has not come to the step channel within {deadline:g} s")


def join(address: tuple[str, int], key: bytes, rank: int, prints: Fingerprints, deadline: float) -> Connection:
    """As another rank: the connection to rank 0.

    Raises:
        ConfigError: rank 0 has other weights, configuration or code.
        WireError: it is not there, or gives no answer within `deadline` seconds.
    """
    connection = connect(address, key, timeout=deadline)
    connection.send({"rank": rank, "fingerprints": asdict(prints)})
    answer = connection.receive(timeout=deadline).body
    if "refused" in answer:
        connection.close()
        raise ConfigError(f"{answer['refused']}. Give all hosts the same model, flags and podquant")
    return connection


def follow(
    executor: Executor, connection: Connection, deadlines: Deadlines, on_busy: Callable[[float | None], None]
) -> None:
    """Run every step that rank 0 announces, until it says that none follows.

    Args:
        on_busy: told when a wait for the devices begins (a time of `time.monotonic`), and None when it is over.

    Raises:
        WireError: rank 0 is gone.
    """
    ahead: deque[jax.Array] = deque()
    expected = 1
    while True:
        # longer than rank 0's parent waits, which knows better what is the matter with it
        message = connection.receive(timeout=1.5 * deadlines.liveness)
        if "end" in message.body:
            return
        if "beat" in message.body:
            continue
        if message.body["step"] != expected:
            raise WireError(f"{connection.address}: announced step {message.body['step']}, expected {expected}")
        expected += 1
        on_busy(time.monotonic())
        bucket = Bucket(message.body["batch"], message.body["length"], message.body["scores"])
        sampled, _ = executor.run(bucket, _arrays(message))
        ahead.append(sampled.tokens)
        if len(ahead) > _AHEAD:
            ahead.popleft().block_until_ready()
        on_busy(None)


def _arrays(message: Message) -> list[Array]:
    """The host values of a step, as wide as they were."""
    ints, *others = message.arrays
    return [np.pad(ints, ((0, 0), (0, message.body["width"] - ints.shape[1]))), *others]


def _guarded(peer: socket.socket, key: bytes, welcome: Callable[[Connection], None]) -> None:
    """Shake hands with a caller in a thread of its own: a stranger who says nothing holds up nobody."""
    try:
        welcome(Connection(peer, key, is_server=True))
    except WireError as error:
        _log.warning("refused on the step channel: %s", error)
