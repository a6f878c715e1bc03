"""Hosts of a Ray cluster. Ray places tasks on a pool of workers and retries them when a worker or a host dies.

That does not help against a host that hangs (Ray 2.60 waits for it for ever), so every attempt has its own deadline,
after which the task is also given to another worker. Knows nothing of what tasks do.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from podquant.cluster.hosts import RETRIED, Done, Failed, HostLost, Outcome, Progress, Task
from podquant.cluster.ray_meter import Meter, Overall, count, end_bars, this_host
from podquant.cluster.ray_pool import Pool, connect, reserve_nodes, reserve_slice
from podquant.cluster.topology import TpuSlice
from podquant.errors import ClusterError, PodquantError

OFF_CHIPS: Mapping[str, str] = {"JAX_PLATFORMS": "cpu"}
"""Environment of workers that leave the chips to others."""

_POLL_SECONDS = 0.5
_CANCEL_SECONDS = 2.0  # `ray job stop` kills 3 s after it asked
_NO_HOST_SECONDS = 60.0
_MOST_TRIES = 4
_RERUN = "Run the job again when there are hosts: it continues where it stopped"


class RayHosts:
    """Workers on every host of a Ray cluster; a context manager, connected and reserved within."""

    def __init__(
        self,
        address: str = "auto",
        *,
        accelerator: TpuSlice | None = None,
        workers_per_host: int = 1,
        cpus_per_worker: int = 1,
        environment: Mapping[str, str] = OFF_CHIPS,
        max_retries: int = 3,
        deadline_seconds: float = 1800.0,
        reserve_seconds: float = 600.0,
    ) -> None:
        """Connects nowhere yet.

        Args:
            address: as `ray.init` takes it; `auto` is the cluster this process runs on.
            accelerator: reserve a whole TPU slice of this kind; None takes the hosts as they are.
            workers_per_host: tasks at a time on a host.
            environment: variables of the workers, in addition to those of the job.
            max_retries: how often Ray retries a task that raised one of `RETRIED`, or whose worker or host died.
            deadline_seconds: after which a task is given to another worker as well.
            reserve_seconds: how long to wait for hosts that other jobs hold, or that are being started.
        """
        self._address, self._accelerator = address, accelerator
        self._workers_per_host, self._cpus_per_worker = workers_per_host, cpus_per_worker
        self._deadline, self._reserve_seconds = deadline_seconds, reserve_seconds
        self._options = {
            "num_cpus": cpus_per_worker,
            "max_retries": max_retries,
            "retry_exceptions": list(RETRIED),
            "runtime_env": {"env_vars": dict(environment)},
        }
        self._pool: Pool | None = None

    def __enter__(self) -> Self:
        """Raises ClusterError: there is no cluster, or the hosts asked for were not free in time."""
        connect(self._address)
        try:
            cpus, seconds = self._cpus_per_worker, self._reserve_seconds
            if self._accelerator is None:
                self._pool = reserve_nodes(self._workers_per_host, cpus, seconds=seconds)
            else:
                self._pool = reserve_slice(self._accelerator, self._workers_per_host, cpus, seconds=seconds)
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.release()
            self._pool = None
        ray.shutdown()
        end_bars()

    def run[T](self, tasks: Sequence[Task[T]], on_progress: Progress) -> Generator[Outcome[T], None, None]:
        """As `Hosts.run`; `on_progress` is told a task's bytes when it is done."""
        if self._pool is None:
            raise ClusterError("Ray cluster: not connected: use RayHosts in a with statement")
        run = _Run(self._pool, self._options, self._deadline, tasks)
        overall = Overall(len(tasks), sum(task.bytes_in for task in tasks))
        try:
            while not run.is_over:
                on_progress(0)
                for outcome in run.step():
                    if isinstance(outcome, Done):
                        overall.done(outcome.task)
                        on_progress(outcome.task.bytes_in)
                    elif isinstance(outcome, HostLost):
                        count("tries_lost", 1)
                    yield outcome
                    if isinstance(outcome, Failed):
                        return
        finally:
            run.cancel()
            overall.close()


@dataclass(frozen=True)
class _Answer:
    value: Any
    host: str


@ray.remote
def _call(task: Task[Any]) -> _Answer:
    with Meter(task) as meter:
        return _Answer(task.function(*task.args, meter.advance), this_host())


@dataclass
class _Try:
    """A task that Ray runs. `is_late`: another worker was given it too, though this one may still answer."""

    task: Task[Any]
    begin: float = field(default_factory=time.monotonic)
    is_late: bool = False


class _Run:
    """The tasks of one `RayHosts.run`: waiting, or with Ray."""

    def __init__(self, pool: Pool, options: Mapping[str, Any], deadline: float, tasks: Sequence[Task[Any]]) -> None:
        self._pool, self._deadline = pool, deadline
        strategy = PlacementGroupSchedulingStrategy(pool.group)
        self._call = _call.options(**options, scheduling_strategy=strategy)
        self._waiting = deque(tasks)
        self._tries: dict[ray.ObjectRef[_Answer], _Try] = {}
        self._begun: dict[str, int] = {}
        self._seen = time.monotonic()
        self._num_workers = 0

    @property
    def is_over(self) -> bool:
        """Every task has ended."""
        return not self._waiting and not self._tries

    def step(self) -> Generator[Outcome[Any], None, None]:
        """Count the hosts, hand out tasks, and wait a moment for answers."""
        self._num_workers = len(self._pool.hosts) * self._pool.workers_per_host
        if self._num_workers:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > _NO_HOST_SECONDS:
            yield Failed("", ClusterError(f"Ray cluster: no host left for {_NO_HOST_SECONDS:g} s. {_RERUN}"))
            return
        running = sum(not attempt.is_late for attempt in self._tries.values())
        for _ in range(min(self._num_workers - running, len(self._waiting))):
            task = self._waiting.popleft()
            self._begun[task.key] = self._begun.get(task.key, 0) + 1
            self._tries[self._call.remote(task)] = _Try(task)
        if not self._tries:
            time.sleep(_POLL_SECONDS)  # no host: they may come back
            return
        ready, _ = ray.wait(list(self._tries), num_returns=1, timeout=_POLL_SECONDS)
        for ref in ready:
            yield from self._settle(ref)
        yield from self._late()

    def cancel(self) -> None:
        """Stop what runs, and wait until it has: nothing may be written once the caller has unlocked the target."""
        refs = list(self._tries)
        self._tries.clear()
        self._waiting.clear()
        for ref in refs:
            _stop(ref)
        if refs:
            with suppress(RayError):
                ray.wait(refs, num_returns=len(refs), timeout=_CANCEL_SECONDS)

    def _settle(self, ref: ray.ObjectRef[_Answer]) -> Generator[Outcome[Any], None, None]:
        attempt = self._tries.pop(ref)
        task = attempt.task
        try:
            answer: _Answer = ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            yield Failed(task.key, cause if isinstance(cause, PodquantError) else error)
        except RayError as error:  # Ray has given up: the worker or its host died again and again
            reason = str(error).strip().partition("\n")[0]
            if not attempt.is_late:
                yield from self._again(task, reason)
        else:
            self._forget(task.key)
            yield Done(task, answer.value, answer.host)

    def _late(self) -> Generator[Outcome[Any], None, None]:
        """Give late tasks to another worker; the first may still answer, if its host is only slow."""
        for attempt in list(self._tries.values()):
            if not attempt.is_late and time.monotonic() - attempt.begin > self._deadline:
                attempt.is_late = True
                yield from self._again(attempt.task, f"no answer for {self._deadline:g} s")

    def _again(self, task: Task[Any], reason: str) -> Generator[Outcome[Any], None, None]:
        yield HostLost(task.key, reason)
        if self._begun[task.key] >= _MOST_TRIES:
            tries = self._begun[task.key]
            error = ClusterError(
                f"{task.key}: lost {tries} times, last because: {reason}. If workers are killed for their memory, run "
                "fewer of them on a host"
            )
            yield Failed(task.key, error)
        self._waiting.appendleft(task)

    def _forget(self, key: str) -> None:
        """A task is done: stop every other attempt at it."""
        for ref, attempt in list(self._tries.items()):
            if attempt.task.key == key:
                del self._tries[ref]
                _stop(ref)
        self._waiting = deque(task for task in self._waiting if task.key != key)


def _stop(ref: ray.ObjectRef[_Answer]) -> None:
    """Kill the worker that runs it; what cannot be reached is left alone."""
    with suppress(RayError, ValueError):
        ray.cancel(ref, force=True)
