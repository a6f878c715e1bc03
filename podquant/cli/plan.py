"""`podquant plan MODEL`: what `podquant convert` would do, from the headers alone."""

from __future__ import annotations

import argparse
from contextlib import closing

from podquant.cli.source import add_source_arguments, open_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant plan`."""
    add_source_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    from podquant.convert.report import plan_lines

    checkpoint, plan = open_source(
        arguments.model,
        arguments.quantization_config_path,
        revision=arguments.revision,
        download_dir=arguments.download_dir,
        tp_size=arguments.tp_size,
        strict_rules=arguments.strict_rules,
    )
    with closing(checkpoint):
        print(*plan_lines(plan, threads=arguments.threads, window_bytes=checkpoint.store.window_bytes), sep="\n")
    return 0
