"""A model served on the hosts of a Ray cluster, of which the TPU slice's first answers HTTP."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from podquant.app.environment import slice_of, worker_environment
from podquant.app.options import API_KEY_VARIABLE, ServeOptions
from podquant.app.serve import (
    group_options,
    options_of,
    read_api_key,
    require_key_where_others_reach,
    serve_part,
)
from podquant.app.signals import StopSignal, raising_stop
from podquant.cluster.ray_actors import RayActors
from podquant.config.job import ServeJob
from podquant.config.secrecy import INSTEAD
from podquant.errors import ConfigError


def serve_on_ray(job: ServeJob, *, address: str) -> None:
    """Serve until a signal. Call it in the main thread.

    Host 0 takes the key that callers must send from its own environment or a file of its own. Where this process has
    one and host 0 has not, nothing is served: it was not meant to be open.

    Args:
        address: of the cluster, as `ray.init` takes it.
    """
    options = options_of(job)
    with _actors(job, address) as actors:
        try:
            with raising_stop(threading.Event()):
                actors.run(partial(_serve_on_host, options, API_KEY_VARIABLE in os.environ))
        except StopSignal:
            actors.end(options.drain_seconds)
            print("stopped", file=sys.stderr, flush=True)


def check_host(job: ServeJob, *, address: str) -> None:
    """Find out whether host 0 could answer HTTP as the job says, before what it would serve is made.

    Args:
        address: of the cluster, as `ray.init` takes it.

    Raises:
        ConfigError: as serving would.
    """
    options = options_of(job)
    with _actors(job, address) as actors:
        actors.run(partial(_check_on_host, options, API_KEY_VARIABLE in os.environ))


def _actors(job: ServeJob, address: str) -> RayActors:
    return RayActors(address, accelerator=slice_of(job.cluster), environment=worker_environment(job.cluster))


def _check_on_host(
    options: ServeOptions,
    expects_key: bool,
    rank: int,
    addresses: Sequence[str],
    port: int,
    secret: str,
    is_stopped: threading.Event,
) -> None:
    """What is one host's part of serving before anything is loaded."""
    if rank > 0:
        return
    key = read_api_key(options)
    if expects_key and key is None:
        raise ConfigError(
            f"{API_KEY_VARIABLE}: the job has it, but host 0, {addresses[0]}, does not, and is not sent it, since Ray "
            f"would log it: {INSTEAD}"
        )
    require_key_where_others_reach(replace(options, api_key=key))


def _serve_on_host(
    options: ServeOptions,
    expects_key: bool,
    rank: int,
    addresses: Sequence[str],
    port: int,
    secret: str,
    is_stopped: threading.Event,
) -> None:
    """One host's part; its JAX is in a process of its own, also where there is one host only."""
    _check_on_host(options, expects_key, rank, addresses, port, secret, is_stopped)
    options = replace(options, nnodes=len(addresses), node_rank=rank, dist_init_addr=f"{addresses[0]}:{port}")
    serve_part(options, group_options(options, secret), is_stopped)
