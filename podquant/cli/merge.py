"""`podquant merge ARTIFACT OUT`: put the tensor-parallel slices of an artifact together."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant merge`."""
    parser.add_argument("artifact", metavar="ARTIFACT", help="a directory that podquant convert --tp-size wrote")
    parser.add_argument("out", metavar="OUT", help="the directory to write; it appears when it is complete")


def run(arguments: argparse.Namespace) -> int:
    """Write the same artifact at tp_size 1, an ordinary Hugging Face checkpoint."""
    from podquant.app.artifacts import merge

    print(*merge(arguments.artifact, arguments.out), sep="\n")
    return 0
