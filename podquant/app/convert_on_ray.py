"""A conversion on the hosts of a Ray cluster."""

from __future__ import annotations

from podquant.app.convert import run_job
from podquant.app.environment import slice_of, worker_environment
from podquant.cluster.ray_hosts import OFF_CHIPS, RayHosts
from podquant.config.job import ClusterOptions, ConvertJob


def convert_on_ray(job: ConvertJob, *, address: str, download_dir: str | None = None) -> None:
    """Convert, and print what was done. Call it in the main thread.

    Args:
        address: of the cluster, as `ray.init` takes it.
        download_dir: download a Hugging Face id whole, to there, first.
    """
    run_job(job, hosts=conversion_hosts(job.cluster, address), download_dir=download_dir)


def conversion_hosts(options: ClusterOptions, address: str) -> RayHosts:
    """The hosts to convert on, reserved on entering; their workers leave the chips to others."""
    return RayHosts(
        address,
        accelerator=slice_of(options),
        workers_per_host=options.workers_per_host,
        cpus_per_worker=options.threads_per_worker,
        environment={**OFF_CHIPS, **worker_environment(options)},
        max_retries=options.max_retries,
        deadline_seconds=options.unit_deadline_seconds,
    )
