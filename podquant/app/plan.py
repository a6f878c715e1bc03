"""What a conversion would do, here or on many hosts, from the headers alone."""

from __future__ import annotations

from contextlib import closing

from podquant.app.report import plan_lines
from podquant.app.source import SourceOptions, open_source
from podquant.cluster.topology import parse_slice
from podquant.conversion.forecast import forecast
from podquant.conversion.plan import Plan


def plan(options: SourceOptions) -> Plan:
    """The plan. Raises as `open_source`."""
    checkpoint, planned = open_source(options)
    checkpoint.close()
    return planned


def plan_report(
    options: SourceOptions, *, threads: int, num_hosts: int | None = None, workers_per_host: int = 1
) -> list[str]:
    """The plan as lines of text.

    Args:
        threads: of each process that converts.
        num_hosts: forecast for so many hosts; None for one process.
    """
    checkpoint, planned = open_source(options)
    with closing(checkpoint):
        window_bytes = checkpoint.store.window_bytes
    spread = None
    if num_hosts is not None:
        spread = forecast(
            planned,
            num_hosts=num_hosts,
            workers_per_host=workers_per_host,
            threads=threads,
            window_bytes=window_bytes,
        )
    return plan_lines(planned, threads=threads, window_bytes=window_bytes, spread=spread)


def hosts_of_slice(name: str) -> int:
    """The hosts of a TPU slice, `v5e:4x4` or `v5e-16`. Raises ConfigError for one that there is not."""
    return parse_slice(name).num_hosts
