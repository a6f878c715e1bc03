"""Hosts of a Ray cluster. Ray places tasks on a pool of workers; what is lost is retried here, never by Ray itself.

So one budget covers all ways of losing an attempt: Ray by itself retries what is killed for its memory without end, and
waits for ever for a host that hangs. Knows nothing of what tasks do.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from podquant.cluster.hosts import RETRIED, Done, Failed, HostLost, Outcome, Progress, Task
from podquant.cluster.losses import Budget, Cause, Loss, note
from podquant.cluster.ray_inquest import Worker, begin_inquest, this_worker
from podquant.cluster.ray_meter import Meter, Overall, count, end_bars, this_host
from podquant.cluster.ray_pool import Pool, connect, reserve
from podquant.cluster.ray_watch import HeadWatch
from podquant.cluster.topology import TpuSlice
from podquant.errors import ClusterError, PodquantError

OFF_CHIPS: Mapping[str, str] = {"JAX_PLATFORMS": "cpu"}
"""Environment of workers that leave the chips to others."""

_POLL_SECONDS = 0.5
_CANCEL_SECONDS = 2.0  # `ray job stop` kills 3 s after it asked
_NO_HOST_SECONDS = 60.0
_INQUEST_SECONDS = 15.0


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
            max_retries: how often a task is retried that raised one of `RETRIED`, or whose worker died; see `losses`.
            deadline_seconds: after which a task is given to another worker as well.
            reserve_seconds: how long to wait for hosts that other jobs hold, or that are being started.
        """
        self._address, self._accelerator = address, accelerator
        self._workers_per_host, self._cpus_per_worker = workers_per_host, cpus_per_worker
        self._deadline, self._reserve_seconds = deadline_seconds, reserve_seconds
        self._options = {
            "num_cpus": cpus_per_worker,
            "max_retries": 0,
            "num_returns": "streaming",
            "runtime_env": {"env_vars": dict(environment)},
        }
        self._max_retries = max_retries
        self._pool: Pool | None = None
        self._watch: HeadWatch | None = None

    def __enter__(self) -> Self:
        """Raises ClusterError: there is no cluster, its head is lost, or the hosts asked for were not free in time."""
        connect(self._address)
        watch = HeadWatch()
        workers, cpus, seconds = self._workers_per_host, self._cpus_per_worker, self._reserve_seconds
        try:
            self._pool = watch.reserve(partial(reserve, self._accelerator, workers, cpus, seconds=seconds))
        except BaseException as error:
            watch.leave(lambda: None, error)
            raise
        self._watch = watch
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None and self._watch is not None:
            self._watch.leave(self._pool.release, error)
            self._pool = self._watch = None
        end_bars()

    def run[T](self, tasks: Sequence[Task[T]], on_progress: Progress) -> Generator[Outcome[T], None, None]:
        """As `Hosts.run`; `on_progress` is told a task's bytes when it is done."""
        if self._pool is None or self._watch is None:
            raise ClusterError("Ray cluster: not connected: use RayHosts in a with statement")
        run = _Run(self._pool, self._watch, self._options, self._deadline, Budget(self._max_retries), tasks)
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
        except ClusterError as error:  # without a head
            yield Failed("", error)
        finally:
            run.cancel()
            overall.close()


@dataclass(frozen=True)
class _Answer:
    value: Any
    host: str


@ray.remote
def _call(task: Task[Any]) -> Generator[Worker | _Answer, None, None]:
    """Who does it, at once, so that it is known whose end it was; then the answer."""
    yield this_worker()
    with Meter(task) as meter:
        value = task.function(*task.args, meter.advance)
    yield _Answer(value, this_host())


type _Stream = ray.ObjectRefGenerator[Worker | _Answer]


@dataclass
class _Try:
    """A task that Ray runs. `is_late`: another worker was given it too, though this one may still answer."""

    task: Task[Any]
    begin: float = field(default_factory=time.monotonic)
    worker: Worker | None = None
    is_late: bool = False


@dataclass(frozen=True)
class _Inquest:
    """The host of an attempt whose worker has died is being asked what became of it."""

    attempt: _Try
    begin: float = field(default_factory=time.monotonic)


class _Run:
    """The tasks of one `RayHosts.run`: waiting, or with Ray."""

    def __init__(
        self,
        pool: Pool,
        watch: HeadWatch,
        options: Mapping[str, Any],
        deadline: float,
        budget: Budget,
        tasks: Sequence[Task[Any]],
    ) -> None:
        self._pool, self._watch, self._deadline, self._budget = pool, watch, deadline, budget
        strategy = PlacementGroupSchedulingStrategy(pool.group)
        self._call: Any = _call.options(**options, scheduling_strategy=strategy)
        self._waiting = deque(tasks)
        self._tries: dict[_Stream, _Try] = {}
        self._inquests: dict[ray.ObjectRef[Loss], _Inquest] = {}
        self._seen = time.monotonic()
        self._num_workers = 0

    @property
    def is_over(self) -> bool:
        """Every task has ended."""
        return not self._waiting and not self._tries and not self._inquests

    def step(self) -> Generator[Outcome[Any], None, None]:
        """Count the hosts, hand out tasks, and wait a moment for answers."""
        self._watch.refuse_loss()
        self._num_workers = len(self._watch.hosts) * self._pool.workers_per_host
        if self._num_workers:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > _NO_HOST_SECONDS:
            yield Failed("", ClusterError(f"Ray cluster: no host left for {_NO_HOST_SECONDS:g} s"))
            return
        running = sum(not attempt.is_late for attempt in self._tries.values())
        for _ in range(min(self._num_workers - running, len(self._waiting))):
            task = self._waiting.popleft()
            self._tries[self._call.remote(task)] = _Try(task)
        watched = [*self._tries, *self._inquests]
        if not watched:
            time.sleep(_POLL_SECONDS)  # no host: they may come back
            return
        ready, _ = ray.wait(watched, num_returns=1, timeout=_POLL_SECONDS)
        for each in ready:
            yield from self._hear(each) if each in self._tries else self._conclude(each)
        yield from self._late()

    def cancel(self) -> None:
        """Stop what runs, and wait until it has: nothing may be written once the caller has unlocked the target."""
        streams = list(self._tries)
        self._tries.clear()
        self._inquests.clear()
        self._waiting.clear()
        for stream in streams:
            _stop(stream)
        if streams:
            ends = [stream.completed() for stream in streams]
            with suppress(RayError):
                ray.wait(ends, num_returns=len(ends), timeout=_CANCEL_SECONDS)

    def _hear(self, stream: _Stream) -> Generator[Outcome[Any], None, None]:
        """Take what an attempt says next: who does it, its answer, or its end without one."""
        attempt = self._tries[stream]
        task = attempt.task
        try:
            said = ray.get(next(stream))
        except RayTaskError as error:
            del self._tries[stream]
            cause = error.cause
            if isinstance(cause, RETRIED):
                yield from self._again(attempt, Loss(Cause.ERROR, str(cause)))
            else:
                yield Failed(task.key, cause if isinstance(cause, PodquantError) else error)
        except RayError as error:
            del self._tries[stream]
            if isinstance(error, WorkerCrashedError) and attempt.worker is not None:
                self._watch.await_answer()
                self._inquests[begin_inquest(attempt.worker)] = _Inquest(attempt)
            else:
                yield from self._again(attempt, _loss_of(error))
        else:
            if isinstance(said, Worker):
                attempt.worker = said
                return
            del self._tries[stream]
            self._forget(task.key)
            yield Done(task, said.value, said.host)

    def _conclude(self, inquest: ray.ObjectRef[Loss]) -> Generator[Outcome[Any], None, None]:
        """What became of a worker, as its host says; a host that cannot say has gone too."""
        attempt = self._inquests.pop(inquest).attempt
        try:
            loss = ray.get(inquest)
        except RayError as error:
            loss = Loss(Cause.HOST, _first_line(error))
        yield from self._again(attempt, loss)

    def _late(self) -> Generator[Outcome[Any], None, None]:
        """Give late tasks to another worker; the first may still answer, if its host is only slow. So with inquests."""
        for attempt in list(self._tries.values()):
            if not attempt.is_late and time.monotonic() - attempt.begin > self._deadline:
                yield from self._again(attempt, Loss(Cause.LATE, f"not within {self._deadline:g} s"))
                attempt.is_late = True
        for ref, inquest in list(self._inquests.items()):
            if time.monotonic() - inquest.begin > _INQUEST_SECONDS:
                del self._inquests[ref]
                loss = Loss(Cause.HOST, f"which has not answered for {_INQUEST_SECONDS:g} s")
                yield from self._again(inquest.attempt, loss)

    def _again(self, attempt: _Try, loss: Loss) -> Generator[Outcome[Any], None, None]:
        """A loss, and the end of the run if the task has had enough of them; else it waits for a worker again."""
        task = attempt.task
        if attempt.is_late:  # another has it
            return
        yield HostLost(task.key, note(task, loss))
        if (error := self._budget.spend(task, loss)) is not None:
            yield Failed(task.key, error)
        self._waiting.appendleft(task)

    def _forget(self, key: str) -> None:
        """A task is done: stop every other attempt at it."""
        for stream, attempt in list(self._tries.items()):
            if attempt.task.key == key:
                del self._tries[stream]
                _stop(stream)
        self._inquests = {ref: each for ref, each in self._inquests.items() if each.attempt.task.key != key}
        self._waiting = deque(task for task in self._waiting if task.key != key)


def _loss_of(error: RayError) -> Loss:
    """Of an attempt that ended before its worker was known, or whose end Ray itself explains."""
    if isinstance(error, OutOfMemoryError):
        return Loss(Cause.MEMORY, _first_line(error))
    return Loss(Cause.HOST if isinstance(error, NodeDiedError) else Cause.KILLED, _first_line(error))


def _first_line(error: RayError) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _stop(stream: _Stream) -> None:
    """Kill the worker that runs it; what cannot be reached is left alone."""
    with suppress(RayError, ValueError):
        ray.cancel(stream, force=True)
