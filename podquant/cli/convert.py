"""`podquant convert MODEL OUT`: quantize a checkpoint into an artifact."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

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

    check_target(arguments.out, overwrite=arguments.overwrite)
    checkpoint, plan = open_source(arguments)
    with closing(checkpoint):
        for line in note_lines(plan):
            print(line, file=sys.stderr)
        with progress("converting", plan.bytes_in) as shown, _stopping_between_windows(shown) as advance:
            result = convert(
                checkpoint,
                plan,
                arguments.out,
                threads=arguments.threads,
                overwrite=arguments.overwrite,
                on_progress=advance,
            )
    print(*quality_lines({name: asdict(figures) for name, figures in result.quality.items()}), sep="\n")
    written = sum(file.size for file in result.manifest.files.values())
    print(f"{arguments.out}: {size_text(plan.bytes_in)} converted to {size_text(written)}")
    return 0


@contextmanager
def _stopping_between_windows(advance: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """Within, SIGTERM and Ctrl-C end the work at its next step, so that what it wrote is removed; a second one at once.

    Raised wherever the signal finds the program, the exception could break a lock that is being let go.
    """
    arrived: list[int] = []

    def note(number: int, frame: object) -> None:
        arrived.append(number)
        if len(arrived) > 1:
            raise KeyboardInterrupt

    def advance_or_stop(count: int) -> None:
        if arrived:
            raise KeyboardInterrupt if arrived[0] == signal.SIGINT else SystemExit(128 + arrived[0])
        advance(count)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield advance_or_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
