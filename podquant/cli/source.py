"""The MODEL of a command line, a local directory or a Hugging Face id to download first, and its quantization rules."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from podquant.errors import ConfigError

if TYPE_CHECKING:
    from podquant.checkpoint.index import Checkpoint
    from podquant.convert.plan import Plan


_MOST_THREADS = 8  # by default: each takes some GB/s, more than most storage gives


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to find it, the rules, and how many threads."""
    parser.add_argument("model", metavar="MODEL", help="a local directory, or a Hugging Face id (org/name)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--download-dir", metavar="DIR", help="where to keep what is downloaded (Hugging Face's cache)")
    parser.add_argument(
        "--quantization-config-path",
        metavar="YAML",
        required=True,
        help="the rules: a path, or the name of a file that podquant ships, such as int8.yaml",
    )
    parser.add_argument("--strict-rules", action="store_true", help="a rule that matches nothing is an error")
    parser.add_argument(
        "--tp-size", metavar="N", type=positive, default=1, help="cut every weight into N tensor-parallel slices"
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=positive,
        default=min(len(os.sched_getaffinity(0)), _MOST_THREADS),
        help="threads that read and quantize (%(default)s)",
    )


def open_source(arguments: argparse.Namespace) -> tuple[Checkpoint, Plan]:
    """The checkpoint and the plan for it. The rules are read first: what is wrong there costs no download.

    Raises:
        PodquantError: the rules, the checkpoint or the two together are wrong.
    """
    from podquant.checkpoint.index import Checkpoint
    from podquant.config.rules import load_quantization_config
    from podquant.convert.plan import plan_conversion

    rules = load_quantization_config(arguments.quantization_config_path)
    path, name = locate(arguments)
    checkpoint = Checkpoint.open(path)
    plan = plan_conversion(checkpoint, rules, source_name=name, tp_size=arguments.tp_size)
    if arguments.strict_rules:
        plan.refuse_unmatched()
    return checkpoint, plan


def locate(arguments: argparse.Namespace) -> tuple[str, str]:
    """The local directory of MODEL, and a name for it that is the same on every machine."""
    if os.path.exists(arguments.model) or "://" in arguments.model or arguments.model.startswith((".", "/", "~")):
        if arguments.revision is not None or arguments.download_dir is not None:
            raise ConfigError(
                f"--revision and --download-dir are for Hugging Face ids, but {arguments.model} is a local directory: "
                "leave them out"
            )
        return arguments.model, os.path.basename(os.path.abspath(os.path.expanduser(arguments.model)))
    from podquant.storage.hub import download_model

    snapshot = download_model(arguments.model, revision=arguments.revision, directory=arguments.download_dir)
    return snapshot.path, snapshot.name


def positive(text: str) -> int:
    """An integer from 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text}")
    return value
