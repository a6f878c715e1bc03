"""One long-running function on every host of a TPU slice, or of a Ray cluster, each in an actor with its rank.

The rank is the host's label `ray.io/tpu-worker-id`, which libtpu requires; the order of a placement group's bundles
says nothing about it. Hosts without that label are ranked by address. All get a secret of this run, sealed for each, as
Ray's messages are encrypted by nobody. Knows nothing of what runs.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from podquant.cluster.ray_pool import Pool, connect, reserve
from podquant.cluster.ray_watch import HeadWatch
from podquant.cluster.sealed import Recipient, seal
from podquant.cluster.topology import TpuSlice
from podquant.errors import ClusterError, PodquantError

_WORKER_LABEL = "ray.io/tpu-worker-id"
_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 120.0

_log = logging.getLogger(__name__)

HostFunction = Callable[[int, Sequence[str], int, str, threading.Event], None]
"""Called on each host with its rank, the addresses of all hosts by rank, a port of rank 0 where they can meet, a secret
that they alone have, and an event that is set when it has to end."""


@dataclass(frozen=True)
class _Location:
    """The host that an actor runs on, a port that is held there, and the key to seal secrets with for the actor."""

    worker: int | None
    address: str
    port: int
    public_key: bytes


@ray.remote
class _HostActor:
    """A process on one host."""

    def __init__(self) -> None:
        self._is_stopped = threading.Event()
        self._recipient = Recipient()
        self._held_port = socket.socket()

    def locate(self) -> _Location:
        labels: Mapping[str, Any] = ray.get_runtime_context().get_node_labels()
        worker = labels.get(_WORKER_LABEL)
        address = str(ray.util.get_node_ip_address())
        port = _hold_port(self._held_port, address)
        return _Location(None if worker is None else int(worker), address, port, self._recipient.public)

    def run(self, function: HostFunction, rank: int, addresses: Sequence[str], port: int, sealed: bytes) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        function(rank, addresses, port, self._recipient.open(sealed).decode(), self._is_stopped)

    def stop(self) -> None:
        self._is_stopped.set()


class RayActors:
    """An actor on every host; a context manager, connected and reserved within. Leaving it ends what still runs."""

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
            environment: variables of the processes, in addition to those of the job.
            reserve_seconds: how long to wait for hosts that other jobs hold, or that are being started.
        """
        self._address, self._accelerator = address, accelerator
        self._environment, self._reserve_seconds = dict(environment or {}), reserve_seconds
        self._pool: Pool | None = None
        self._watch: HeadWatch | None = None
        self._actors: list[Any] = []
        self._bundles: list[int] = []
        self._runs: dict[Any, int] = {}
        self._arrivals: dict[Any, int] = {}
        self._secret = secrets.token_hex(32).encode()

    def __enter__(self) -> Self:
        """Raises ClusterError: there is no cluster, its head is lost, or the hosts asked for were not free in time."""
        connect(self._address)
        watch = HeadWatch()
        try:
            self._pool = watch.reserve(partial(reserve, self._accelerator, 1, 1, seconds=self._reserve_seconds))
        except BaseException as error:
            watch.leave(lambda: None, error)
            raise
        self._watch = watch
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._watch is not None, "within the context"
        self._watch.leave(self._release, error)

    @property
    def num_hosts(self) -> int:
        """Hosts reserved."""
        assert self._pool is not None, "within the context"
        return self._pool.num_hosts

    def run(self, function: HostFunction) -> None:
        """Run a function on every host until it returns on rank 0; run it again on a host whose process has died.

        Raises:
            PodquantError: what the function raised.
            ClusterError: the labels of the hosts are not those of one slice, or Ray's head is lost.
        """
        assert self._watch is not None, "within the context"
        locations = self._start_actors()
        self._begin(function, locations, range(len(locations)))
        while True:
            self._watch.refuse_loss()
            done, _ = ray.wait([*self._runs, *self._arrivals], num_returns=1, timeout=_POLL_SECONDS)
            for ref in done:
                rank = self._runs.pop(ref) if ref in self._runs else self._arrivals.pop(ref)
                is_lost, value = self._outcome(ref, rank)
                if is_lost:
                    self._watch.await_answer()  # what follows asks the head for a new process
                if isinstance(value, _Location):
                    locations[rank] = value
                    self._begin(function, locations, [rank])
                elif rank == 0 and not is_lost:
                    return
                elif rank == 0:  # the others were given its address: they begin again as well
                    self._kill_actors()
                    locations = self._start_actors()
                    self._begin(function, locations, range(len(locations)))
                    break
                elif is_lost:
                    self._actors[rank] = self._new_actor(self._bundles[rank])
                    self._arrivals[self._actors[rank].locate.remote()] = rank

    def end(self, seconds: float) -> None:
        """After an exception in `run`: tell the function on rank 0 to end, and wait for that for `seconds`."""
        first = [ref for ref, rank in self._runs.items() if rank == 0]
        with suppress(RayError):
            for actor in self._actors[:1]:
                actor.stop.remote()
            if first:
                ray.wait(first, timeout=seconds)

    def _begin(self, function: HostFunction, locations: Sequence[_Location], ranks: Sequence[int]) -> None:
        addresses = [location.address for location in locations]
        for rank in ranks:
            sealed = seal(self._secret, locations[rank].public_key)
            self._runs[self._actors[rank].run.remote(function, rank, addresses, locations[0].port, sealed)] = rank

    def _release(self) -> None:
        assert self._pool is not None, "within the context"
        self._kill_actors()
        self._pool.release()

    def _kill_actors(self) -> None:
        self._runs.clear()
        self._arrivals.clear()
        for actor in self._actors:
            with suppress(RayError):
                ray.kill(actor)

    def _outcome(self, ref: Any, rank: int) -> tuple[bool, Any]:
        """Whether a call ended because its process died, and its value if not."""
        try:
            return False, ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, PodquantError) else error) from error
        except RayActorError as error:
            _log.warning("host %d: its process died: %s", rank, str(error).strip().partition("\n")[0])
            return True, None

    def _start_actors(self) -> list[_Location]:
        """Start a process on every host; their locations, by rank."""
        bundles = list(range(self.num_hosts))
        actors = [self._new_actor(bundle) for bundle in bundles]
        try:
            found: list[_Location] = ray.get([actor.locate.remote() for actor in actors], timeout=_ANSWER_SECONDS)
        except (GetTimeoutError, RayActorError) as error:
            raise ClusterError(f"Ray cluster: not every host started its process: {error}") from error
        order = sorted(bundles, key=lambda bundle: (found[bundle].worker or 0, _numbers(found[bundle].address)))
        workers = [found[bundle].worker for bundle in order]
        if any(worker is not None for worker in workers) and workers != bundles:
            raise ClusterError(
                f"Ray cluster: expected hosts with {_WORKER_LABEL} 0 to {len(bundles) - 1}, one each, got {workers}. "
                "Give the accelerator, so that the hosts of one slice are reserved"
            )
        self._actors, self._bundles = [actors[bundle] for bundle in order], order
        return [found[bundle] for bundle in order]

    def _new_actor(self, bundle: int) -> Any:
        assert self._pool is not None, "within the context"
        chips = 0 if self._accelerator is None else self._accelerator.chips_per_host
        strategy = PlacementGroupSchedulingStrategy(self._pool.group, placement_group_bundle_index=bundle)
        return _HostActor.options(  # type: ignore[attr-defined]
            num_cpus=0,
            max_concurrency=2,  # `stop` while `run` runs
            resources={"TPU": chips} if chips else {},
            scheduling_strategy=strategy,
            runtime_env={"env_vars": self._environment},
        ).remote()


def _hold_port(holder: socket.socket, address: str) -> int:
    """Bind `holder` to a free port without listening: the system gives the port to nobody who takes any, while who asks
    for it by number, with SO_REUSEADDR as well, as `socket.create_server` does, can listen there."""
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((address, 0))
    return int(holder.getsockname()[1])


def _numbers(address: str) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in address.split(".")]
