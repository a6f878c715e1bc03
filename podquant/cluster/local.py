"""Hosts without a cluster: tasks run in this process, one after another."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence

from podquant.cluster.hosts import RETRIED, Done, Failed, Outcome, Progress, Task
from podquant.errors import PodquantError

_HERE = "this process"
_log = logging.getLogger(__name__)


class LocalHosts:
    """This process, as the only host. An error other than a PodquantError passes through, with its traceback."""

    def __init__(self, max_retries: int = 3) -> None:
        """`max_retries`: how often a task is retried after errors that may pass."""
        self._max_retries = max_retries

    def run[T](self, tasks: Sequence[Task[T]], on_progress: Progress) -> Generator[Outcome[T], None, None]:
        """As `Hosts.run`, in the order of `tasks`."""
        for task in tasks:
            try:
                value = self._run(task, on_progress)
            except PodquantError as error:
                yield Failed(task.key, error)
                return
            yield Done(task, value, _HERE)

    def _run[T](self, task: Task[T], on_progress: Progress) -> T:
        for left in range(self._max_retries, -1, -1):
            told = 0

            def advance(count: int) -> None:
                nonlocal told
                told += count
                on_progress(count)

            try:
                return task.function(*task.args, advance)
            except RETRIED as error:
                if not left:
                    raise
                _log.warning("%s: retried after: %s", task.key, error)
                on_progress(-told)
        raise AssertionError("unreachable")
