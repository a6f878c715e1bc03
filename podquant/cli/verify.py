"""`podquant verify ARTIFACT`: check an artifact to the last byte."""

from __future__ import annotations

import argparse
import sys

from podquant.foreign import cut_words


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant verify`."""
    parser.add_argument("artifact", metavar="ARTIFACT", help="a directory that podquant convert wrote")


def run(arguments: argparse.Namespace) -> int:
    """Print every problem; status 1 if there is one."""
    from podquant.app.artifacts import verify

    problems = verify(arguments.artifact)
    for problem in problems:
        print(f"error: {cut_words(problem)}", file=sys.stderr)
    if problems:
        return 1
    print(f"{arguments.artifact}: every file, header, scale and code is as the manifest says")
    return 0
