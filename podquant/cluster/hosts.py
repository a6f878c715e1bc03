"""Functions to run on hosts, and what can become of each, as types.

Knows nothing of what a function does, or of how a host is reached: `local` runs here, `ray_hosts` on a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from podquant.errors import TransientStorageError

Progress = Callable[[int], None]
"""Told the bytes done since it was last called, maybe 0. What it raises ends the run."""

RETRIED = (TransientStorageError,)
"""Errors of a function after which it is run again."""


@dataclass(frozen=True)
class Task[T]:
    """A function to run once, somewhere: `function(*args, on_progress)`, its last argument a `Progress`.

    It may run twice at a time on two hosts (one that hangs is given up, not stopped), so it must be idempotent. The
    function, its arguments and its result are pickled and go through the head: a plan and a receipt, never weights.

    Attributes:
        key: names it in messages; unlike that of any other task of the run.
        bytes_in: what `on_progress` will have been told in all, for progress, time left and metrics.
        bytes_out: what it writes, for metrics.
    """

    key: str
    function: Callable[..., T]
    args: tuple[Any, ...] = ()
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True)
class Done[T]:
    """A task's result, and the host it came from."""

    task: Task[T]
    value: T
    host: str


@dataclass(frozen=True)
class HostLost:
    """A host died, or gave no answer in time, with a task; another does it again. Not the end of the task."""

    key: str
    reason: str


@dataclass(frozen=True)
class Failed:
    """What ended the run: a task's own error, which no other host would spare it, or a ClusterError."""

    key: str
    error: Exception


type Outcome[T] = Done[T] | HostLost | Failed


class Hosts(Protocol):
    """Where functions run."""

    def run[T](self, tasks: Sequence[Task[T]], on_progress: Progress) -> Generator[Outcome[T], None, None]:
        """Run them, begun in their order; yields one Done a task as they come, and a HostLost for each try lost.

        A Failed is the last outcome: what was running has been cancelled. So it is when the iterator is closed, which
        an error in the caller's loop must do: `with closing(hosts.run(tasks, on_progress)) as outcomes: …`.

        Args:
            on_progress: called in the caller's thread, at least once a second while a task makes progress or a cluster
                is watched.
        """
