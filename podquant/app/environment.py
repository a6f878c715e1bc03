"""What work runs on: threads of this machine, and the hosts of a cluster with their environment variables."""

from __future__ import annotations

import logging
import os

from podquant.cluster.ray_pool import job_environment
from podquant.cluster.topology import TpuSlice, parse_slice
from podquant.config.job import ClusterOptions
from podquant.config.secrecy import INSTEAD, is_secret

_log = logging.getLogger(__name__)

HOST_THREADS = ClusterOptions().threads_per_worker
FORWARDED = ("STORAGE_EMULATOR_HOST", "NO_GCE_CHECK", "GOOGLE_CLOUD_PROJECT", "FSSPEC_GCS_", "FSSPEC_GS_", "HF_")
"""Beginnings of the environment variables that say how storage is reached: workers get them too, unless they are
secrets."""

MOST_THREADS = 8
"""By default: each takes some GB/s, more than most storage gives."""


def own_threads() -> int:
    """Threads that read and quantize in this process, unless told otherwise."""
    return min(len(os.sched_getaffinity(0)), MOST_THREADS)


def worker_environment(options: ClusterOptions) -> dict[str, str]:
    """Variables for processes on the hosts of a cluster: how storage is reached from here, and what the job says.

    Secrets are left out, as Ray logs all of it: hosts have their own.
    """
    own = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    secrets = sorted(name for name, value in own.items() if is_secret(name, value))
    if secrets:
        _log.warning(
            "%s: not sent to the hosts, since Ray would write it into its logs. Where hosts need it, %s",
            ", ".join(secrets),
            INSTEAD,
        )
    exposed = sorted(name for name, value in job_environment().items() if is_secret(name, value))
    if exposed:
        _log.warning(
            "%s: is in the job's runtime_env, which Ray has written to disk on every host. Replace the secret, and %s",
            ", ".join(exposed),
            INSTEAD,
        )
    return {name: value for name, value in own.items() if name not in secrets} | dict(options.env)


def slice_of(options: ClusterOptions) -> TpuSlice | None:
    """The TPU slice to reserve; None to take the hosts that are there. Raises ConfigError for one that there is not."""
    return None if options.accelerator is None else parse_slice(options.accelerator)
