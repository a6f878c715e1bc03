"""Why attempts at a task were lost, and after how many the task is given up: one budget for all ways of losing one.

A task that is lost with its host is not to blame, and is retried for long. One that kills its workers ends the run soon
and says what it is and what to change. Knows nothing of how it is found out what became of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Any

from podquant.cluster.hosts import Task
from podquant.errors import ClusterError

_MOST_LOST_WITH_HOSTS, _MOST_LATE = 15, 3
_LESS_MEMORY = (
    "Run fewer workers on a host (workers_per_host), with fewer threads each (threads_per_worker), or take hosts with "
    "more memory"
)


class Cause(Enum):
    """How an attempt ended without an answer: the predicate of a sentence about its worker."""

    HOST = "was lost with its host"
    LATE = "gave no answer in time"
    ERROR = "met an error that may pass"
    CRASHED = "crashed"
    KILLED = "was killed from outside"
    MEMORY = "was killed for its memory"


_ELSEWHERE = (Cause.HOST, Cause.LATE)


@dataclass(frozen=True)
class Loss:
    """An attempt lost: how, and what more is known, such as the host, the signal, the log."""

    cause: Cause
    detail: str

    def __str__(self) -> str:
        return f"its worker {self.cause.value}: {self.detail}"


class Budget:
    """What the tasks of a run may still lose."""

    def __init__(self, max_retries: int) -> None:
        """`max_retries`: of a task whose workers end otherwise than with their host."""
        self._max_retries = max_retries
        self._lost: dict[str, Counter[Cause]] = {}

    def spend(self, task: Task[Any], loss: Loss) -> ClusterError | None:
        """Count a loss. Returns what ends the run, if the task is not to be tried again."""
        lost = self._lost.setdefault(task.key, Counter())
        lost[loss.cause] += 1
        own = sum(count for cause, count in lost.items() if cause not in _ELSEWHERE)
        if own <= self._max_retries and lost[Cause.HOST] <= _MOST_LOST_WITH_HOSTS and lost[Cause.LATE] <= _MOST_LATE:
            return None
        history = ", ".join(f"{cause.value} {count} times" for cause, count in lost.items())
        return ClusterError(f"{describe(task)}: its worker {history}, last: {loss.detail}. {_advice(loss.cause)}")


def describe(task: Task[Any]) -> str:
    """A task for who has to find out what it does to its workers: its name, what is in it, and its memory."""
    facts = [task.contents] if task.contents else []
    if task.memory:
        facts.append(f"a worker holds up to {task.memory / 1e6:,.0f} MB for it by forecast, beside Python itself")
    return f"{task.key} ({'; '.join(facts)})" if facts else task.key


def note(task: Task[Any], loss: Loss) -> str:
    """A loss after which the task is tried again, in a line; where memory is short, also what to change."""
    if loss.cause is not Cause.MEMORY:
        return str(loss)
    return f"{loss}. This was {describe(task)}. If it happens again: {_LESS_MEMORY}"


def _advice(cause: Cause) -> str:
    match cause:
        case Cause.MEMORY:
            return _LESS_MEMORY
        case Cause.KILLED:
            return f"If that was for their memory, as the host's kernel log (dmesg) would say: {_LESS_MEMORY}"
        case Cause.CRASHED:
            return "What the log shows is a fault of podquant's or of a library's: report it with that log"
        case Cause.ERROR:
            return "Look at the storage"
        case Cause.LATE:
            return "Raise unit_deadline_seconds if hosts or storage are only slow"
        case Cause.HOST:
            return "If hosts end whenever this is tried, look at their memory"
