"""Functions to run on hosts, and the ways in which each can end, as types.

Knows nothing of what a function does, or of how a host is reached: `local` runs here, `ray_hosts` on a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from podquant.errors import TransientStorageError

Progress = Callable[[int], None]
"""Called with the bytes done since the last call, maybe 0. What it raises ends the run."""

RETRIED = (TransientStorageError,)
"""Errors of a function after which it is retried."""


@dataclass(frozen=True)
class Task[T]:
    """A function to run once, somewhere: `function(*args, on_progress)`, its last argument a `Progress`.

    It may run on two hosts at a time (one that hangs is given up, not stopped), so it must be idempotent. The function,
    its arguments and its result are pickled and pass through the head: a plan and a receipt, never weights.

    Attributes:
        key: names it in messages; unique in the run.
        bytes_in: the sum of what `on_progress` will be told, for progress, time left and metrics.
        bytes_out: the bytes it writes, for metrics.
        contents: what it works on, for who has to find out why its workers die.
        memory: bytes that a worker holds for it at most, beside the interpreter and its libraries; 0 if not known.
    """

    key: str
    function: Callable[..., T]
    args: tuple[Any, ...] = ()
    bytes_in: int = 0
    bytes_out: int = 0
    contents: str = ""
    memory: int = 0


@dataclass(frozen=True)
class Done[T]:
    """A task's result, and the host it came from."""

    task: Task[T]
    value: T
    host: str


@dataclass(frozen=True)
class HostLost:
    """A host died, or did not answer in time, with a task; another host retries it. Not the end of the task."""

    key: str
    reason: str


@dataclass(frozen=True)
class Failed:
    """What ended the run: a task's own error, which it would meet on any host, or a ClusterError."""

    key: str
    error: Exception


type Outcome[T] = Done[T] | HostLost | Failed


class Hosts(Protocol):
    """Where functions run."""

    def run[T](self, tasks: Sequence[Task[T]], on_progress: Progress) -> Generator[Outcome[T], None, None]:
        """Run them, started in their order; yields one Done per task as they end, and a HostLost for each attempt lost.

        A Failed is the last outcome: what was running has been cancelled. Closing the iterator cancels too, so a caller
        whose loop may raise closes it: `with closing(hosts.run(tasks, on_progress)) as outcomes: …`.

        Args:
            on_progress: called in the caller's thread, at least once a second while a task makes progress or a cluster
                is watched.
        """
