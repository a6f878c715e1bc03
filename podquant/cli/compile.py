"""`podquant compile MODEL --topology SLICE`: the steps of a server compiled here for a slice that is not here."""

from __future__ import annotations

import argparse
import sys

from podquant.cli.arguments import up_to
from podquant.cli.serving_flags import add_serving_flags, read_served, read_serving_flags
from podquant.config.job import MOST_SLICES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant compile`."""
    parser.add_argument("model", metavar="MODEL", help="a local directory, gs://…, or a Hugging Face id (org/name)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--download-dir", metavar="DIR", help="download a Hugging Face id whole, to this cache, first")
    parser.add_argument(
        "--quantization-config-path",
        metavar="YAML",
        help="as quantized by these rules: a path, or the name of a file that podquant ships, such as int8.yaml",
    )
    parser.add_argument(
        "--allow-extra-tensors", action="store_true", help="go on where tensors are there that the model does not use"
    )
    parser.add_argument("--topology", metavar="SLICE", required=True, help="the TPU slice, such as v6e:4x4")
    parser.add_argument(
        "--tp-size", metavar="N", type=up_to(MOST_SLICES), help="devices to cut the model over (default: all)"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="write JAX's persistent compilation cache there; that a pod finds it is not verified",
    )
    add_serving_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compile, and print what the compiler says."""
    from podquant.app.compile_ahead import compile_report

    report = compile_report(
        read_served(arguments),
        arguments.topology,
        read_serving_flags(arguments),
        arguments.out,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(*report, sep="\n")
    return 0
