"""The step channel: rank 0 broadcasts every step before it dispatches it, the other ranks run what they receive.

They meet first: each rank shows what it would compute with, and one that has other weights, another configuration or
other code is refused by name. Knows nothing of requests, or of who started these processes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import jax

from podquant.engine.executor import Executor
from podquant.engine.programs import Bucket, Inputs
from podquant.errors import ClusterError, ConfigError
from podquant.group.codec import encode
from podquant.group.fingerprint import Fingerprints, differences
from podquant.group.launch import Deadlines
from podquant.group.messages import (
    FROM_RANK,
    TO_RANK,
    EndOfSteps,
    Heartbeat,
    RankHello,
    Refusal,
    Step,
    ToRank,
    Welcome,
)
from podquant.group.wire import Connection, PeerListener, Reception, WireError, connect

_log = logging.getLogger(__name__)

_AHEAD = 1
"""Steps a follower dispatches beyond the one it waits for, as the engine does."""

Follower = Connection[RankHello]
"""Rank 0's end of the step channel to another rank."""

Leader = Connection[ToRank]
"""Another rank's end of it."""


class StepBroadcaster:
    """Rank 0's end: connections to all other ranks, which hear every step and, while there is none, a heartbeat."""

    def __init__(self, followers: Sequence[Follower], deadlines: Deadlines) -> None:
        self._followers, self._deadlines = followers, deadlines
        self._num_steps = 0
        self._ended = threading.Event()
        if followers:
            threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True).start()

    def broadcast(self, bucket: Bucket, inputs: Inputs) -> None:
        """Tell all others of a step. Raises WireError if one is gone."""
        if not self._followers:
            return
        self._num_steps += 1
        arrays = tuple(array for array in inputs if array is not None)
        payload = encode(Step(self._num_steps, bucket.num_tokens, bucket.scores, arrays))
        for follower in self._followers:
            follower.send_encoded(payload, timeout=self._deadlines.liveness)

    def end(self) -> None:
        """Tell the others that no step follows."""
        self._ended.set()
        for follower in self._followers:
            try:
                follower.send(EndOfSteps())
            except WireError as error:
                _log.warning("%s", error)

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(self._deadlines.heartbeat):
            try:
                for follower in self._followers:
                    follower.send(Heartbeat())
            except WireError as error:  # a step will find it too, or who watches this process
                _log.warning("%s", error)
                return


def accept_ranks(
    listener: PeerListener, key: bytes, fingerprints: Fingerprints, num_ranks: int, deadline: float
) -> list[Follower]:
    """As rank 0: the connections of ranks 1 and up, once all are there and have the same to compute with.

    Args:
        deadline: seconds to wait for them.

    Raises:
        ConfigError: a rank has other weights, configuration or code.
        ClusterError: not all have come in time; names who is missing.
    """
    end = time.monotonic() + deadline
    came: dict[int, Follower] = {}
    wrong: list[str] = []
    turn = threading.Lock()

    def welcome(caller: Follower) -> None:
        hello = caller.receive(timeout=max(0.1, end - time.monotonic()))
        rank, different = hello.rank, differences(hello.fingerprints, fingerprints, "rank 0's")
        with turn:
            if not 0 < rank < num_ranks or rank in came:
                caller.send(Refusal(f"rank {rank} of {num_ranks} is taken, or is none", is_final=False))
                caller.close()
            elif different:
                text = f"rank {rank} refused: {'; '.join(different)}"
                wrong.append(text)
                caller.send(Refusal(text, is_final=True))
                caller.close()
            else:
                caller.send(Welcome())
                came[rank] = caller

    reception = Reception(listener, FROM_RANK, key, welcome, _tell_refusal)
    while len(came) < num_ranks - 1 and not wrong and time.monotonic() < end:
        reception.take_in(timeout=0.2)
    with turn:
        if len(came) == num_ranks - 1:
            return [came[rank] for rank in range(1, num_ranks)]
        for caller in came.values():
            caller.close()
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}. Give all hosts the same model, flags and podquant")
    missing = ", ".join(str(rank) for rank in range(1, num_ranks) if rank not in came)
    raise ClusterError(f"rank {missing} has not come to the step channel within {deadline:g} s")


def join(address: tuple[str, int], key: bytes, rank: int, fingerprints: Fingerprints, deadline: float) -> Leader:
    """As another rank: the connection to rank 0.

    Raises:
        ConfigError: rank 0 has other weights, configuration or code.
        WireError: it is not there, or gives no answer within `deadline` seconds.
    """
    connection = connect(address, TO_RANK, key, timeout=deadline)
    connection.send(RankHello(rank, fingerprints))
    answer = connection.receive(timeout=deadline)
    if isinstance(answer, Refusal):
        connection.close()
        if not answer.is_final:
            raise WireError(f"{connection.address}: {answer.reason}")
        raise ConfigError(f"{answer.reason}. Give all hosts the same model, flags and podquant")
    if not isinstance(answer, Welcome):
        raise connection.unexpected(answer)
    return connection


def follow(
    executor: Executor, connection: Leader, deadlines: Deadlines, on_busy: Callable[[float | None], None]
) -> None:
    """Run every step that rank 0 broadcasts, until it says that none follows.

    Args:
        on_busy: told when a wait for the devices begins (a time of `time.monotonic`), and None when it is over.

    Raises:
        WireError: rank 0 is gone.
    """
    ahead: deque[jax.Array] = deque()
    expected = 1
    while True:
        # longer than rank 0's parent waits, which knows better what is the matter with it
        match connection.receive(timeout=1.5 * deadlines.liveness):
            case EndOfSteps():
                return
            case Heartbeat():
                continue
            case Step() as step:
                inputs = _inputs(step, expected, connection.address)
            case message:
                raise connection.unexpected(message)
        expected += 1
        on_busy(time.monotonic())
        try:
            sampled, _ = executor.run(Bucket(step.num_tokens, step.scores), inputs)
        except ValueError as error:
            raise WireError(f"{connection.address}: broadcast step {step.number} cannot be run: {error}") from error
        ahead.append(sampled.tokens)
        if len(ahead) > _AHEAD:
            ahead.popleft().block_until_ready()
        on_busy(None)


def _inputs(step: Step, expected: int, leader: str) -> Inputs:
    """The host values of a step. Raises WireError if it is not the one that is expected."""
    if step.number != expected:
        raise WireError(f"{leader}: broadcast step {step.number}, expected {expected}")
    num_arrays = len(Inputs._fields) - (not step.scores)
    if len(step.arrays) != num_arrays:
        raise WireError(f"{leader}: broadcast step {step.number} with {len(step.arrays)} arrays, expected {num_arrays}")
    return Inputs(*step.arrays)


def _tell_refusal(error: WireError) -> None:
    _log.warning("refused on the step channel: %s", error)
