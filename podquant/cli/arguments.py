"""The flags that `plan` and `convert` share: MODEL and how to find it, the rules, slices and threads."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from podquant.app.environment import HOST_THREADS, MOST_THREADS, own_threads
from podquant.config.job import MOST_SLICES, MOST_THREADS_PER_WORKER
from podquant.foreign import cut


def add_source_arguments(parser: argparse.ArgumentParser, *, needs_rules: bool = True) -> None:
    """MODEL and how to find it, the rules, and how many threads."""
    parser.add_argument("model", metavar="MODEL", help="a local directory, gs://…, or a Hugging Face id (org/name)")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--download-dir", metavar="DIR", help="download a Hugging Face id whole, to this cache, first")
    parser.add_argument(
        "--quantization-config-path",
        metavar="YAML",
        required=needs_rules,
        help="the rules: a path, or the name of a file that podquant ships, such as int8.yaml",
    )
    parser.add_argument("--strict-rules", action="store_true", help="a rule that matches nothing is an error")
    parser.add_argument(
        "--weights-only", action="store_true", help="of any model, whether or not podquant can serve it"
    )
    parser.add_argument(
        "--allow-extra-tensors", action="store_true", help="go on where tensors are there that the model does not use"
    )
    parser.add_argument(
        "--tp-size",
        metavar="N",
        type=up_to(MOST_SLICES),
        default=1,
        help="cut every weight into N tensor-parallel slices",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=up_to(MOST_THREADS_PER_WORKER),
        help="threads of a process that read and quantize (default: one for each CPU it may use, at most "
        f"{MOST_THREADS}; {HOST_THREADS} on the hosts of a cluster)",
    )


def num_threads(arguments: argparse.Namespace, *, is_here: bool) -> int:
    """As asked for; else what suits this machine if it is the one that works, and hosts of a cluster otherwise."""
    return arguments.threads or (own_threads() if is_here else HOST_THREADS)


def up_to(most: int) -> Callable[[str], int]:
    """What reads an integer from 1 to `most`, for argparse."""

    def integer(text: str) -> int:
        value = int(text)
        if not 1 <= value <= most:
            raise argparse.ArgumentTypeError(f"expected an integer from 1 to {most:,}, got {cut(text)}")
        return value

    return integer
