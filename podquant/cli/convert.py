"""`podquant convert MODEL OUT`: quantize a checkpoint into an artifact, here or on the hosts of a Ray cluster."""

from __future__ import annotations

import argparse

from podquant.cli.arguments import add_source_arguments, num_threads, up_to
from podquant.config.job import MOST_WORKERS_PER_HOST
from podquant.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant convert`."""
    add_source_arguments(parser)
    parser.add_argument("out", metavar="OUT", help="the directory to write; it appears when it is complete")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the artifact that is at OUT, once done; give up another conversion that was begun there",
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="keep NaN and infinities in what is not quantized"
    )
    cluster = parser.add_argument_group("on a Ray cluster")
    cluster.add_argument(
        "--address", help="convert on the hosts of this cluster (host:6379), or of the one here (auto)"
    )
    cluster.add_argument(
        "--accelerator", metavar="TYPE", help="reserve a whole TPU slice, such as v5e-16; else the hosts that are there"
    )
    cluster.add_argument(
        "--workers-per-host",
        metavar="N",
        type=up_to(MOST_WORKERS_PER_HOST),
        help="processes on each host (1)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print what was done and how good it is."""
    from podquant.config.job import ClusterOptions, ConvertJob

    is_here = arguments.address is None
    if is_here:
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
        weights_only=arguments.weights_only,
        allow_extra_tensors=arguments.allow_extra_tensors,
        allow_nonfinite=arguments.allow_nonfinite,
        cluster=ClusterOptions(
            accelerator=arguments.accelerator,
            workers_per_host=arguments.workers_per_host or 1,
            threads_per_worker=num_threads(arguments, is_here=is_here),
        ),
        name="command line",
    )
    if is_here:
        from podquant.app.convert import run_job

        run_job(job, download_dir=arguments.download_dir)
    else:
        from podquant.app.convert_on_ray import convert_on_ray

        convert_on_ray(job, address=arguments.address, download_dir=arguments.download_dir)
    return 0
