"""What people and dashboards see of a run on Ray: bars in bytes by `tqdm_ray`, counters by `ray.util.metrics`.

Knows nothing of what the tasks do. Counters, by host: `podquant_bytes_read`, `podquant_bytes_written`,
`podquant_units_begun`, `podquant_units_done` (more begun than done: retries); from the driver `podquant_tries_lost`.
"""

from __future__ import annotations

from functools import cache
from types import TracebackType
from typing import Any, Self

import ray
from ray.experimental import tqdm_ray
from ray.util.metrics import Counter

from podquant.cluster.hosts import Task

_FLUSH_SECONDS = 2.0


class Meter:
    """In a worker, around one task: its bar and its counters."""

    def __init__(self, task: Task[Any]) -> None:
        self._task = task
        self._bar = _bar(f"{this_host()} {task.key}", task.bytes_in)
        count("units_begun", 1)

    def advance(self, nbytes: int) -> None:
        """A `Progress`."""
        count("bytes_read", nbytes)
        self._bar.update(nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            count("units_done", 1)
            count("bytes_written", self._task.bytes_out)
        self._bar.close()


class Overall:
    """On the driver: one bar over all tasks, in bytes and units, with the time left."""

    def __init__(self, num_tasks: int, nbytes: int) -> None:
        self._total, self._done = num_tasks, 0
        self._bar = _bar(self._text(), nbytes)

    def done(self, task: Task[Any]) -> None:
        """One more task is done."""
        self._done += 1
        self._bar.update(task.bytes_in)
        self._bar.set_description(self._text())

    def close(self) -> None:
        """Close the bar as it stands."""
        self._bar.close()

    def _text(self) -> str:
        return f"{self._done} of {self._total} units"


def end_bars() -> None:
    """Close the bars left open by workers that were stopped, or whose last messages did not arrive.

    `tqdm` would close them at interpreter exit, and sometimes crash there: CPython 3.13.0 may have unloaded `datetime`
    by then, which tqdm needs for the time left.
    """
    for group in tqdm_ray.instance().bar_groups.values():
        for bar in group.bars_by_uuid.values():
            bar.close()
        group.bars_by_uuid.clear()


def count(name: str, amount: int) -> None:
    """Add to one of the dashboard's counters, for this host."""
    if amount > 0:
        _counter(name).inc(amount, {"host": this_host()})


@cache
def this_host() -> str:
    """The address of this process's node."""
    return str(ray.util.get_node_ip_address())


def _bar(text: str, nbytes: int) -> Any:
    return tqdm_ray.tqdm(desc=text, total=nbytes, unit="B", flush_interval_s=_FLUSH_SECONDS)


@cache
def _counter(name: str) -> Counter:
    return Counter(f"podquant_{name}", f"podquant: {name.replace('_', ' ')}", tag_keys=("host",))
