"""`podquant merge ARTIFACT OUT`: put the tensor-parallel slices of an artifact together."""

from __future__ import annotations

import argparse
from contextlib import closing

from podquant.app.progress import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant merge`."""
    parser.add_argument("artifact", metavar="ARTIFACT", help="a directory that podquant convert --tp-size wrote")
    parser.add_argument("out", metavar="OUT", help="the directory to write; it appears when it is complete")


def run(arguments: argparse.Namespace) -> int:
    """Write the same artifact at tp_size 1, an ordinary Hugging Face checkpoint."""
    from podquant.artifact.merge import merge_artifact
    from podquant.artifact.reader import read_manifest
    from podquant.storage.store import open_store

    with closing(open_store(arguments.artifact)) as store:
        source = read_manifest(store)
    with progress("merging", sum(file.size for file in source.files.values())) as advance:
        manifest = merge_artifact(arguments.artifact, arguments.out, advance)
    print(f"{arguments.out}: {source.tp_size} slices put together, {len(manifest.files)} files")
    return 0
