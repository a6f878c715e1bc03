"""`podquant inspect ARTIFACT`: what an artifact says about itself."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant inspect`."""
    parser.add_argument("artifact", metavar="ARTIFACT", help="a directory that podquant convert wrote")


def run(arguments: argparse.Namespace) -> int:
    """Print manifest, schemes, sizes and the quality table."""
    from podquant.app.artifacts import inspect

    print(*inspect(arguments.artifact), sep="\n")
    return 0
