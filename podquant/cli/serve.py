"""`podquant serve MODEL`: load a model, answer HTTP, drain on SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import sys

from podquant.cli.options import add_options, read_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `podquant serve`."""
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; a second one ends at once."""
    options = read_options(arguments)
    level = options.log_level.upper()
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("jax", "httpx", "huggingface_hub", "uvicorn", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level]))
    from podquant.app.serve import serve

    serve(options)
    return 0
