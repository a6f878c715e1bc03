"""`podquant plan MODEL`: what converting it takes, here or on many hosts, and serving it on a slice; from headers."""

from __future__ import annotations

import argparse

from podquant.cli.arguments import add_source_arguments, num_threads, up_to
from podquant.cli.serving_flags import add_serving_flags, read_served, read_serving_flags, refuse_serving_flags
from podquant.config.job import MOST_HOSTS, MOST_WORKERS_PER_HOST
from podquant.errors import ConfigError

_EVERYWHERE = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant plan`."""
    add_source_arguments(parser, needs_rules=False)
    parser.set_defaults(tp_size=None)
    cluster = parser.add_argument_group("on a cluster")
    hosts = cluster.add_mutually_exclusive_group()
    hosts.add_argument(
        "--topology",
        metavar="SLICE",
        help="convert on the hosts of a TPU slice, such as v5e:4x4, and serve there (on --tp-size of its devices, by "
        "default on all); all: compare all slices to serve on",
    )
    hosts.add_argument("--hosts", metavar="N", type=up_to(MOST_HOSTS), help="forecast for so many hosts")
    cluster.add_argument(
        "--workers-per-host",
        metavar="N",
        type=up_to(MOST_WORKERS_PER_HOST),
        help="processes on each host (1)",
    )
    add_serving_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    topology = arguments.topology
    if topology is None:
        refuse_serving_flags(arguments)
        if arguments.quantization_config_path is None:
            raise ConfigError(
                "nothing to plan: give --quantization-config-path to convert, --topology to serve, or both"
            )
        if arguments.hosts is None and arguments.workers_per_host is not None:
            raise ConfigError("--workers-per-host is for many hosts: give --topology or --hosts as well")
    if arguments.quantization_config_path is not None and topology != _EVERYWHERE:
        print(*_conversion(arguments), sep="\n", flush=True)
    if topology is not None and not arguments.weights_only:
        print(*_serving(arguments), sep="\n")
    return 0


def _conversion(arguments: argparse.Namespace) -> list[str]:
    from podquant.app.plan import hosts_of_slice, plan_report
    from podquant.app.source import SourceOptions

    num_hosts = arguments.hosts if arguments.topology is None else hosts_of_slice(arguments.topology)
    options = SourceOptions(
        arguments.model,
        arguments.quantization_config_path,
        revision=arguments.revision,
        download_dir=arguments.download_dir,
        tp_size=arguments.tp_size or 1,
        strict_rules=arguments.strict_rules,
        weights_only=arguments.weights_only,
        allow_extra_tensors=arguments.allow_extra_tensors,
    )
    lines = plan_report(
        options,
        threads=num_threads(arguments, is_here=num_hosts is None),
        num_hosts=num_hosts,
        workers_per_host=arguments.workers_per_host or 1,
    )
    return lines if arguments.topology is None else [*lines, ""]


def _serving(arguments: argparse.Namespace) -> list[str]:
    from podquant.app.plan_serving import serving_report

    return serving_report(read_served(arguments), arguments.topology, read_serving_flags(arguments))
