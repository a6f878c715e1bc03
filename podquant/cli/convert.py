"""`podquant convert MODEL OUT`: quantize a checkpoint into an artifact, here or on the hosts of a Ray cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from podquant.app.progress import progress
from podquant.app.signals import stopping
from podquant.app.source import add_source_arguments, num_threads, open_source, positive, worker_environment
from podquant.errors import ConfigError

if TYPE_CHECKING:
    from podquant.cluster.hosts import Hosts
    from podquant.config.job import ClusterOptions, ConvertJob


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant convert`."""
    add_source_arguments(parser)
    parser.add_argument("out", metavar="OUT", help="the directory to write; it appears when it is complete")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the artifact that is at OUT, once done; give up another conversion that was begun there",
    )
    cluster = parser.add_argument_group("on a Ray cluster")
    cluster.add_argument(
        "--address", help="convert on the hosts of this cluster (host:6379), or of the one here (auto)"
    )
    cluster.add_argument(
        "--accelerator", metavar="TYPE", help="reserve a whole TPU slice, such as v5e-16; else the hosts that are there"
    )
    cluster.add_argument("--workers-per-host", metavar="N", type=positive, help="processes on each host (1)")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print what was done and how good it is."""
    from podquant.config.job import ClusterOptions, ConvertJob

    if arguments.address is None:
        for flag in ("accelerator", "workers_per_host"):
            if getattr(arguments, flag) is not None:
                name = flag.replace("_", "-")
                raise ConfigError(f"--{name} is for a Ray cluster: give its --address as well (auto for the one here)")
    job = ConvertJob(
        source=arguments.model,
        target=arguments.out,
        quantization_config_path=arguments.quantization_config_path,
        revision=arguments.revision,
        tp_size=arguments.tp_size,
        strict_rules=arguments.strict_rules,
        overwrite=arguments.overwrite,
        cluster=ClusterOptions(
            accelerator=arguments.accelerator,
            workers_per_host=arguments.workers_per_host or 1,
            threads_per_worker=num_threads(arguments, is_here=arguments.address is None),
        ),
        name="command line",
    )
    return run_job(job, address=arguments.address, download_dir=arguments.download_dir)


def run_job(job: ConvertJob, *, address: str | None, download_dir: str | None = None) -> int:
    """Carry out a job, and print what was done and how good it is.

    Args:
        address: of the Ray cluster to run on, as `ray.init` takes it; None for this process.
        download_dir: download a Hugging Face id whole, to there, first.
    """
    from dataclasses import asdict

    from podquant.app.report import note_lines, quality_lines, size_text, time_line
    from podquant.convert.run import check_source, check_target, convert

    check_target(job.target, overwrite=job.overwrite)
    checkpoint, plan = open_source(
        job.source,
        job.quantization_config_path,
        revision=job.revision,
        download_dir=download_dir,
        tp_size=job.tp_size,
        strict_rules=job.strict_rules,
    )
    with closing(checkpoint):
        check_source(checkpoint)
        for line in note_lines(plan):
            print(line, file=sys.stderr)
        with _hosts(job.cluster, address, plan.bytes_in) as (hosts, shown), stopping(shown) as advance:
            result = convert(
                checkpoint,
                plan,
                job.target,
                hosts=hosts,
                threads=job.cluster.threads_per_worker,
                overwrite=job.overwrite,
                on_progress=advance,
            )
    print(*quality_lines({name: asdict(figures) for name, figures in result.quality.items()}), sep="\n")
    print(time_line(result.seconds))
    written = sum(file.size for file in result.manifest.files.values())
    before = f"; {result.num_units_resumed} units were done before" if result.num_units_resumed else ""
    print(
        f"{job.target}: {size_text(plan.bytes_in)} converted to {size_text(written)} in {len(plan.units)} units{before}"
    )
    return 0


def is_done(job: ConvertJob) -> bool:
    """Whether an artifact is at the target already, and the job is not to overwrite it."""
    from podquant.convert.run import check_target
    from podquant.errors import ArtifactExistsError

    try:
        check_target(job.target, overwrite=job.overwrite)
    except ArtifactExistsError:
        check_target(job.target, overwrite=True)  # refuses what is no artifact
        return True
    return False


@contextmanager
def _hosts(
    options: ClusterOptions, address: str | None, nbytes: int
) -> Iterator[tuple[Hosts | None, Callable[[int], None]]]:
    """The hosts to run on, and what shows progress here; on a cluster they show it themselves."""
    if address is None:
        with progress("converting", nbytes) as shown:
            yield None, shown
        return
    from podquant.cluster.ray_hosts import OFF_CHIPS, RayHosts
    from podquant.cluster.topology import parse_slice

    with RayHosts(
        address,
        accelerator=None if options.accelerator is None else parse_slice(options.accelerator),
        workers_per_host=options.workers_per_host,
        cpus_per_worker=options.threads_per_worker,
        environment={**OFF_CHIPS, **worker_environment(options)},
        max_retries=options.max_retries,
        deadline_seconds=options.unit_deadline_seconds,
    ) as hosts:
        yield hosts, lambda count: None
