"""`podquant plan MODEL`: what `podquant convert` would do, here or on many hosts, from the headers alone."""

from __future__ import annotations

import argparse
from contextlib import closing

from podquant.app.source import add_source_arguments, num_threads, open_source, positive
from podquant.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant plan`."""
    add_source_arguments(parser)
    cluster = parser.add_argument_group("on a cluster")
    hosts = cluster.add_mutually_exclusive_group()
    hosts.add_argument("--topology", metavar="SLICE", help="forecast for the hosts of a TPU slice, such as v5e:4x4")
    hosts.add_argument("--hosts", metavar="N", type=positive, help="forecast for so many hosts")
    cluster.add_argument("--workers-per-host", metavar="N", type=positive, help="processes on each host (1)")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from podquant.app.report import plan_lines
    from podquant.convert.forecast import forecast

    num_hosts = _num_hosts(arguments)
    threads = num_threads(arguments, is_here=num_hosts is None)
    checkpoint, plan = open_source(
        arguments.model,
        arguments.quantization_config_path,
        revision=arguments.revision,
        download_dir=arguments.download_dir,
        tp_size=arguments.tp_size,
        strict_rules=arguments.strict_rules,
    )
    with closing(checkpoint):
        window_bytes = checkpoint.store.window_bytes
        spread = None
        if num_hosts is not None:
            spread = forecast(
                plan,
                num_hosts=num_hosts,
                workers_per_host=arguments.workers_per_host or 1,
                threads=threads,
                window_bytes=window_bytes,
            )
        print(*plan_lines(plan, threads=threads, window_bytes=window_bytes, spread=spread), sep="\n")
    return 0


def _num_hosts(arguments: argparse.Namespace) -> int | None:
    """The hosts to forecast for; None for a conversion in one process."""
    if arguments.topology is not None:
        from podquant.cluster.topology import parse_slice

        return parse_slice(arguments.topology).num_hosts
    if arguments.hosts is None and arguments.workers_per_host is not None:
        raise ConfigError("--workers-per-host is for many hosts: give --topology or --hosts as well")
    return arguments.hosts  # type: ignore[no-any-return]
