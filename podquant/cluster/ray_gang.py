"""One long-running function on every host of a TPU slice, or of a Ray cluster, each with its rank.

The rank is the one that the host's label `ray.io/tpu-worker-id` says, on which libtpu insists; the order of a placement
group's bundles has nothing to do with it. Hosts without labels are numbered by address. Knows nothing of what runs.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from podquant.cluster.ray_pool import Pool, connect, reserve_nodes, reserve_slice
from podquant.cluster.topology import TpuSlice
from podquant.errors import ClusterError, PodquantError

_WORKER_LABEL = "ray.io/tpu-worker-id"
_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 120.0

_log = logging.getLogger(__name__)

HostFunction = Callable[[int, Sequence[str], int, threading.Event], None]
"""Called on each host with its rank, the addresses of all by rank, a port that was free on rank 0, and an event that is
set when it is to end."""


@dataclass(frozen=True)
class _Where:
    """Which host a seat is on, and a port that is free there."""

    worker: int | None
    address: str
    port: int


@ray.remote
class _Seat:
    """A process on one host."""

    def __init__(self) -> None:
        self._is_stopped = threading.Event()

    def where(self) -> _Where:
        labels: Mapping[str, Any] = ray.get_runtime_context().get_node_labels()
        worker = labels.get(_WORKER_LABEL)
        address = str(ray.util.get_node_ip_address())
        with socket.create_server((address, 0)) as free:
            port = free.getsockname()[1]
        return _Where(None if worker is None else int(worker), address, port)

    def run(self, function: HostFunction, rank: int, addresses: Sequence[str], port: int) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        function(rank, addresses, port, self._is_stopped)

    def stop(self) -> None:
        self._is_stopped.set()


class RayGang:
    """The hosts; a context manager, connected and reserved within. Leaving it ends whatever still runs there."""

    def __init__(
        self,
        address: str = "auto",
        *,
        accelerator: TpuSlice | None = None,
        environment: Mapping[str, str] | None = None,
        reserve_seconds: float = 600.0,
    ) -> None:
        """Connects nowhere yet.

        Args:
            address: as `ray.init` takes it.
            accelerator: reserve a whole TPU slice of this kind, with its chips; None takes the hosts as they are.
            environment: variables of the processes, beside those of the job.
            reserve_seconds: how long to wait for hosts that others have, or that are being started.
        """
        self._address, self._accelerator = address, accelerator
        self._environment, self._reserve_seconds = dict(environment or {}), reserve_seconds
        self._pool: Pool | None = None
        self._seats: list[Any] = []
        self._bundles: list[int] = []
        self._runs: dict[Any, int] = {}

    def __enter__(self) -> Self:
        """Raises ClusterError: no cluster there, or no hosts as asked for within the time given."""
        connect(self._address)
        try:
            if self._accelerator is None:
                self._pool = reserve_nodes(1, 1, seconds=self._reserve_seconds)
            else:
                self._pool = reserve_slice(self._accelerator, 1, 1, seconds=self._reserve_seconds)
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._kill_seats()
        if self._pool is not None:
            self._pool.release()
        ray.shutdown()

    @property
    def num_hosts(self) -> int:
        """Hosts reserved."""
        assert self._pool is not None, "within the context"
        return self._pool.num_hosts

    def run(self, function: HostFunction) -> None:
        """Run a function on every host until it returns on rank 0; run it again on a host whose process has died.

        Raises:
            PodquantError: what the function raised.
            ClusterError: the labels of the hosts are not those of one slice.
        """
        wheres = self._take_seats()
        self._begin(function, wheres, range(len(wheres)))
        while True:
            done, _ = ray.wait(list(self._runs), num_returns=1, timeout=_POLL_SECONDS)
            for ref in done:
                rank = self._runs.pop(ref)
                is_lost = self._is_lost(ref, rank)
                if rank == 0 and not is_lost:
                    return
                if rank == 0:  # its address is what the others know: they begin again as well
                    self._kill_seats()
                    wheres = self._take_seats()
                    self._begin(function, wheres, range(len(wheres)))
                    break
                if is_lost:
                    self._seats[rank] = self._new_seat(self._bundles[rank])
                    self._begin(function, wheres, [rank])

    def end(self, seconds: float) -> None:
        """After an exception in `run`: tell the function on rank 0 to end, and wait for that so long."""
        first = [ref for ref, rank in self._runs.items() if rank == 0]
        with suppress(RayError):
            for seat in self._seats[:1]:
                seat.stop.remote()
            if first:
                ray.wait(first, timeout=seconds)

    def _begin(self, function: HostFunction, wheres: Sequence[_Where], ranks: Sequence[int]) -> None:
        addresses = [where.address for where in wheres]
        for rank in ranks:
            self._runs[self._seats[rank].run.remote(function, rank, addresses, wheres[0].port)] = rank

    def _kill_seats(self) -> None:
        self._runs.clear()
        for seat in self._seats:
            with suppress(RayError):
                ray.kill(seat)

    def _is_lost(self, ref: Any, rank: int) -> bool:
        """Whether a run ended because its process died."""
        try:
            ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, PodquantError) else error) from error
        except RayActorError as error:
            _log.warning("host %d: its process died: %s", rank, str(error).strip().partition("\n")[0])
            return True
        return False

    def _take_seats(self) -> list[_Where]:
        """A process on every host; where each is, by rank."""
        bundles = list(range(self.num_hosts))
        seats = [self._new_seat(bundle) for bundle in bundles]
        try:
            found: list[_Where] = ray.get([seat.where.remote() for seat in seats], timeout=_ANSWER_SECONDS)
        except (GetTimeoutError, RayActorError) as error:
            raise ClusterError(f"Ray cluster: not every host has started its process: {error}") from error
        order = sorted(bundles, key=lambda bundle: (found[bundle].worker or 0, _numbers(found[bundle].address)))
        workers = [found[bundle].worker for bundle in order]
        if any(worker is not None for worker in workers) and workers != bundles:
            raise ClusterError(
                f"Ray cluster: expected hosts with {_WORKER_LABEL} 0 to {len(bundles) - 1}, one each, got {workers}. "
                "Give the accelerator, so that the hosts of one slice are reserved"
            )
        self._seats, self._bundles = [seats[bundle] for bundle in order], order
        return [found[bundle] for bundle in order]

    def _new_seat(self, bundle: int) -> Any:
        assert self._pool is not None, "within the context"
        chips = 0 if self._accelerator is None else self._accelerator.chips_per_host
        strategy = PlacementGroupSchedulingStrategy(self._pool.group, placement_group_bundle_index=bundle)
        return _Seat.options(  # type: ignore[attr-defined]
            num_cpus=0,
            max_concurrency=2,  # `stop` while `run` runs
            resources={"TPU": chips} if chips else {},
            scheduling_strategy=strategy,
            runtime_env={"env_vars": self._environment},
        ).remote()


def _numbers(address: str) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in address.split(".")]
