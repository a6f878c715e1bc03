"""What a conversion on many hosts will be: how its units spread, what the busiest host moves, what workers hold.

From the plan alone. Knows nothing of clusters, or of how long a byte takes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from podquant.conversion.plan import Plan


@dataclass(frozen=True)
class Forecast:
    """A conversion on so many hosts.

    Attributes:
        num_hosts: each with as many workers as the others.
        workers_per_host: processes.
        num_units: in all.
        most_units: that one worker does, one after another.
        bytes_in: source bytes that the busiest host reads.
        bytes_out: bytes that the host which writes most writes; what is copied and the manifest are the driver's.
        worker_memory: bytes a worker holds at most, as `Plan.peak_memory`.
        host_memory: bytes its workers hold together.
        balance: source bytes of the busiest worker over the mean of all; 1 if the work comes out even.
    """

    num_hosts: int
    workers_per_host: int
    num_units: int
    most_units: int
    bytes_in: int
    bytes_out: int
    worker_memory: int
    host_memory: int
    balance: float


def forecast(plan: Plan, *, num_hosts: int, workers_per_host: int, threads: int, window_bytes: int) -> Forecast:
    """How a plan spreads over hosts whose workers are equally fast.

    Units are given out in the order of the plan's queue, each to the worker that is free first; here that is the one
    with the fewest source bytes so far. Longest first, the busiest has at most 4/3 of what the best division would give
    it (R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969).
    """
    num_workers = num_hosts * workers_per_host
    free = [(0, worker) for worker in range(num_workers)]  # a heap: source bytes so far
    units, read, written = [0] * num_workers, [0] * num_workers, [0] * num_workers
    for unit in plan.queue:
        done, worker = heapq.heappop(free)
        units[worker] += 1
        read[worker] = done + unit.bytes_in
        written[worker] += unit.bytes_out
        heapq.heappush(free, (read[worker], worker))
    worker_memory = plan.peak_memory(threads, window_bytes)
    return Forecast(
        num_hosts=num_hosts,
        workers_per_host=workers_per_host,
        num_units=len(plan.units),
        most_units=max(units),
        bytes_in=_most(read, num_hosts),
        bytes_out=_most(written, num_hosts),
        worker_memory=worker_memory,
        host_memory=workers_per_host * worker_memory,
        balance=max(read) * num_workers / sum(read) if any(read) else 1.0,
    )


def _most(by_worker: list[int], num_hosts: int) -> int:
    """The most of any host, whose workers are every `num_hosts`-th one."""
    return max(sum(by_worker[host::num_hosts]) for host in range(num_hosts))
