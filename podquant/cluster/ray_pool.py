"""Reserves workers on a Ray cluster: the same number on each host of a TPU slice, or on each node of the cluster.

Always a placement group with one bundle per host, so a host never runs more than its share, and Ray itself moves work
off a host that died. Knows nothing of what workers do. They ask for CPUs; a reserved slice keeps its chips idle.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.tpu import slice_placement_group

from podquant.cluster.topology import TpuSlice
from podquant.errors import ClusterError

_SLICE_LABEL = "ray.io/tpu-slice-name"
_LOOK_SECONDS = 10.0
_CONNECT_SECONDS = 10.0


def connect(address: str) -> None:
    """Make this process a driver of the cluster at `address`, as `ray.init` takes it.

    SIGTERM does what it did before, if that was more than to end the process: Ray would have it exit with status 15.

    Raises:
        ClusterError: there is none. Where nothing listens this is found at once; Ray itself takes two minutes.
    """
    wanted = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = wanted.rpartition(":")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if host and port.isdecimal() and "://" not in host:
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        ray.init(address, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"Ray cluster {wanted or address}: cannot connect: {' '.join(str(error).split())}. Give the address of a "
            "running cluster (host:6379), or run this on one of its hosts"
        ) from error
    finally:
        if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)


def job_environment() -> Mapping[str, str]:
    """The variables that this process's job was submitted with, in its runtime_env; none if Ray did not start it."""
    try:
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    except ValueError:
        return {}
    return dict(config.get("runtime_env", {}).get("env_vars", {}))


@dataclass(frozen=True)
class Pool:
    """Reserved workers. `release()` them when done; they end with the driver in any case."""

    group: PlacementGroup
    workers_per_host: int
    _handle: Any

    @property
    def num_hosts(self) -> int:
        """Hosts reserved, alive or not."""
        return int(self.group.bundle_count)

    @property
    def hosts(self) -> set[str]:
        """Addresses of the hosts that are alive. Asks the cluster."""
        names = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in _alive_nodes()}
        bundles = placement_group_table(self.group)["bundles_to_node_id"].values()
        return {names[node] for node in bundles if node in names}

    def release(self) -> None:
        """Give the hosts back."""
        if self._handle is None:
            remove_placement_group(self.group)
        else:
            self._handle.shutdown()


def reserve(accelerator: TpuSlice | None, workers_per_host: int, cpus_per_worker: int, *, seconds: float) -> Pool:
    """All hosts of a free slice of a kind, or the hosts as they are.

    Raises:
        ClusterError: there is none, or they were not free within `seconds`.
    """
    if accelerator is None:
        return reserve_nodes(workers_per_host, cpus_per_worker, seconds=seconds)
    return reserve_slice(accelerator, workers_per_host, cpus_per_worker, seconds=seconds)


def reserve_slice(tpu: TpuSlice, workers_per_host: int, cpus_per_worker: int, *, seconds: float) -> Pool:
    """All hosts of a free TPU slice; an autoscaler brings one up if there is none.

    Raises:
        ClusterError: none became free within `seconds`.
    """
    cpus = workers_per_host * cpus_per_worker
    failure = ClusterError(
        f"Ray cluster: expected a free TPU slice {tpu.accelerator_type} ({tpu.topology}, {tpu.num_hosts} hosts) with "
        f"{workers_per_host} x {cpus_per_worker} free CPUs on each host, got none within {seconds:g} s. It has: "
        f"{_described(_alive_nodes())}. Leave out the accelerator to run on the hosts as they are"
    )
    try:
        handle = slice_placement_group(
            topology=tpu.topology,
            accelerator_version=tpu.generation.ray_name,
            resources_per_bundle={"CPU": cpus, "TPU": tpu.chips_per_host},
            head_reservation_timeout_s=seconds,
        )
    except (RuntimeError, TimeoutError, ValueError) as error:
        raise failure from error
    group = handle.slice_placement_group
    if not group.wait(seconds):
        handle.shutdown()
        raise failure
    handle.release_head_pgs()
    return Pool(group, workers_per_host, handle)


def reserve_nodes(workers_per_host: int, cpus_per_worker: int, *, seconds: float) -> Pool:
    """The hosts of TPU slices if there are any, whoever holds their chips; else every node with enough CPUs.

    Raises:
        ClusterError: there is none, or they were not free within `seconds`.
    """
    cpus = workers_per_host * cpus_per_worker
    deadline = time.monotonic() + seconds
    while True:  # do not wait for a host that has died meanwhile: look again which are there
        fit, slices = _fit_nodes(workers_per_host, cpus_per_worker)
        selector = {_SLICE_LABEL: f"in({','.join(slices)})"} if slices else {}
        group = placement_group(
            [{"CPU": cpus}] * len(fit), strategy="STRICT_SPREAD", bundle_label_selector=[selector] * len(fit)
        )
        if group.wait(min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic()))):
            return Pool(group, workers_per_host, None)
        remove_placement_group(group)
        if time.monotonic() >= deadline:
            raise ClusterError(
                f"Ray cluster: expected {workers_per_host} x {cpus_per_worker} free CPUs on each of {len(fit)} hosts, "
                f"held by other jobs for {seconds:g} s: {_described(fit)}. Wait for them, or ask for less"
            )


def _fit_nodes(workers_per_host: int, cpus_per_worker: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The hosts to run on, and the slices they belong to; ClusterError if a host of a slice has too few CPUs."""
    nodes = _alive_nodes()
    slices = sorted({node["Labels"][_SLICE_LABEL] for node in nodes if _SLICE_LABEL in node["Labels"]})
    if slices:
        nodes = [node for node in nodes if _SLICE_LABEL in node["Labels"]]
    fit = [node for node in nodes if node["Resources"].get("CPU", 0) >= workers_per_host * cpus_per_worker]
    if not fit or (slices and len(fit) < len(nodes)):
        what = f"{workers_per_host} x {cpus_per_worker} free CPUs on each {'TPU host' if slices else 'node'}"
        raise ClusterError(
            f"Ray cluster: expected {what}, got {_described(nodes)}. Start Ray there with --num-cpus, or ask for "
            "fewer workers a host or fewer threads a worker"
        )
    return fit, slices


def _alive_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _described(nodes: list[dict[str, Any]]) -> str:
    """The first nodes, and their resources."""
    texts = []
    for node in nodes[:4]:
        resources = node["Resources"]
        chips = f", {resources['TPU']:g} TPU chips" if "TPU" in resources else ""
        texts.append(f"{node['NodeManagerAddress']} with {resources.get('CPU', 0):g} CPUs{chips}")
    more = f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
    return (", ".join(texts) or "no nodes") + more
