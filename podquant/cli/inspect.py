"""`podquant inspect ARTIFACT`: what an artifact says about itself."""

from __future__ import annotations

import argparse
from contextlib import closing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant inspect`."""
    parser.add_argument("artifact", metavar="ARTIFACT", help="a directory that podquant convert wrote")


def run(arguments: argparse.Namespace) -> int:
    """Print manifest, schemes, sizes and the quality table."""
    from podquant.app.report import manifest_lines, quality_lines
    from podquant.artifact.reader import Artifact

    with closing(Artifact.open(arguments.artifact)) as artifact:
        print(*manifest_lines(artifact.manifest), "", *quality_lines(artifact.read_quality()), sep="\n")
    return 0
