"""`podquant plan MODEL`: what `podquant convert` would do, here or on many hosts, from the headers alone."""

from __future__ import annotations

import argparse

from podquant.cli.arguments import add_source_arguments, num_threads, up_to
from podquant.config.job import MOST_HOSTS, MOST_WORKERS_PER_HOST
from podquant.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant plan`."""
    add_source_arguments(parser)
    cluster = parser.add_argument_group("on a cluster")
    hosts = cluster.add_mutually_exclusive_group()
    hosts.add_argument("--topology", metavar="SLICE", help="forecast for the hosts of a TPU slice, such as v5e:4x4")
    hosts.add_argument("--hosts", metavar="N", type=up_to(MOST_HOSTS), help="forecast for so many hosts")
    cluster.add_argument(
        "--workers-per-host",
        metavar="N",
        type=up_to(MOST_WORKERS_PER_HOST),
        help="processes on each host (1)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from podquant.app.plan import hosts_of_slice, plan_report
    from podquant.app.source import SourceOptions

    num_hosts = arguments.hosts
    if arguments.topology is not None:
        num_hosts = hosts_of_slice(arguments.topology)
    elif num_hosts is None and arguments.workers_per_host is not None:
        raise ConfigError("--workers-per-host is for many hosts: give --topology or --hosts as well")
    options = SourceOptions(
        arguments.model,
        arguments.quantization_config_path,
        revision=arguments.revision,
        download_dir=arguments.download_dir,
        tp_size=arguments.tp_size,
        strict_rules=arguments.strict_rules,
        weights_only=arguments.weights_only,
        allow_extra_tensors=arguments.allow_extra_tensors,
    )
    report = plan_report(
        options,
        threads=num_threads(arguments, is_here=num_hosts is None),
        num_hosts=num_hosts,
        workers_per_host=arguments.workers_per_host or 1,
    )
    print(*report, sep="\n")
    return 0
