"""A model served on the hosts of a Ray cluster, of which the TPU slice's first answers HTTP."""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from podquant.app.environment import slice_of, worker_environment
from podquant.app.options import ServeOptions
from podquant.app.serve import group_options, options_of, serve_part
from podquant.app.signals import StopSignal, raising_stop
from podquant.cluster.ray_actors import RayActors
from podquant.config.job import ServeJob


def serve_on_ray(job: ServeJob, *, address: str) -> None:
    """Serve until a signal. Call it in the main thread.

    Args:
        address: of the cluster, as `ray.init` takes it.
    """
    options = options_of(job)
    environment = worker_environment(job.cluster)
    with RayActors(address, accelerator=slice_of(job.cluster), environment=environment) as actors:
        try:
            with raising_stop(threading.Event()):
                actors.run(partial(_serve_on_host, options, secrets.token_hex(32)))
        except StopSignal:
            actors.end(options.drain_seconds)
            print("stopped", file=sys.stderr, flush=True)


def _serve_on_host(
    options: ServeOptions,
    secret: str,
    rank: int,
    addresses: Sequence[str],
    port: int,
    is_stopped: threading.Event,
) -> None:
    """One host's part; its JAX is in a process of its own, also where there is one host only."""
    options = replace(options, nnodes=len(addresses), node_rank=rank, dist_init_addr=f"{addresses[0]}:{port}")
    serve_part(options, group_options(options, secret), is_stopped)
