"""What work runs on: threads of this machine, and the hosts of a cluster with their environment variables."""

from __future__ import annotations

import os

from podquant.cluster.topology import TpuSlice, parse_slice
from podquant.config.job import ClusterOptions

HOST_THREADS = ClusterOptions().threads_per_worker
FORWARDED = ("STORAGE_EMULATOR_HOST", "NO_GCE_CHECK", "GOOGLE_CLOUD_PROJECT", "FSSPEC_GCS_", "FSSPEC_GS_", "HF_")
"""Beginnings of the environment variables that say how storage is reached: workers get them too."""

MOST_THREADS = 8
"""By default: each takes some GB/s, more than most storage gives."""


def own_threads() -> int:
    """Threads that read and quantize in this process, unless told otherwise."""
    return min(len(os.sched_getaffinity(0)), MOST_THREADS)


def worker_environment(options: ClusterOptions) -> dict[str, str]:
    """Variables for processes on the hosts of a cluster: how storage is reached from here, and what the job says."""
    return {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)} | dict(options.env)


def slice_of(options: ClusterOptions) -> TpuSlice | None:
    """The TPU slice to reserve; None to take the hosts that are there. Raises ConfigError for one that there is not."""
    return None if options.accelerator is None else parse_slice(options.accelerator)
