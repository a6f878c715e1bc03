"""`podquant convert MODEL OUT`: quantize a checkpoint into an artifact."""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import closing

from podquant.cli.progress import progress
from podquant.cli.source import add_source_arguments, open_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant convert`."""
    add_source_arguments(parser)
    parser.add_argument("out", metavar="OUT", help="the directory to write; it appears when it is complete")
    parser.add_argument("--overwrite", action="store_true", help="replace the artifact that is at OUT, once done")


def run(arguments: argparse.Namespace) -> int:
    """Convert, and print what was done and how good it is."""
    from dataclasses import asdict

    from podquant.convert.report import note_lines, quality_lines, size_text
    from podquant.convert.run import check_target, convert

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left behind
    check_target(arguments.out, overwrite=arguments.overwrite)
    checkpoint, plan = open_source(arguments)
    with closing(checkpoint):
        for line in note_lines(plan):
            print(line, file=sys.stderr)
        with progress("converting", plan.bytes_in) as advance:
            result = convert(
                checkpoint,
                plan,
                arguments.out,
                workers=arguments.workers,
                overwrite=arguments.overwrite,
                on_progress=advance,
            )
    print(*quality_lines({name: asdict(figures) for name, figures in result.quality.items()}), sep="\n")
    written = sum(file.size for file in result.manifest.files.values())
    print(f"{arguments.out}: {size_text(plan.bytes_in)} converted to {size_text(written)}")
    return 0
