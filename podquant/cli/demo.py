"""`podquant demo`: plan, convert, verify, serve and ask a real small model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

_QUESTION = "What is the capital of France?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant demo`."""
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "podquant" / "demo",
        help="where the checkpoint and the artifact go (default: podquant/demo in the user's cache directory)",
    )
    parser.add_argument("--quantization-config-path", default="int8.yaml", metavar="YAML", help="(%(default)s)")
    parser.add_argument("--question", default=_QUESTION, help="what to ask (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "tpu", "cuda"), help="(%(default)s)")
    parser.add_argument("--port", type=int, default=0, help="of the server on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--once", action="store_true", help="stop after the answer")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    from podquant.app.demo.tour import tour
    from podquant.cli.main import main

    return tour(
        main,
        arguments.directory,
        rules=arguments.quantization_config_path,
        question=arguments.question,
        device=arguments.device,
        port=arguments.port,
        once=arguments.once,
    )
