"""`podquant serve MODEL`: load a model, answer HTTP, drain on SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from podquant.cli.options import ServeOptions, add_options, read_options

_LAST_WORDS_SECONDS = 5.0
"""For clients to read what is left once every request has ended."""


class _StopSignal(BaseException):
    """SIGTERM or SIGINT arrived; no `except Exception` on the way may swallow it."""


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
    serve(options)
    return 0


def serve(options: ServeOptions) -> None:
    """Listen first, so that /health answers; then load, serve, and wait for a signal. Call it in the main thread.

    Raises:
        PodquantError: the address or the model cannot be had.
    """
    from podquant.runtime.start import start_engine
    from podquant.server.app import attach_engine, create_app
    from podquant.server.listener import Listener

    name = options.served_model_name or options.model_path
    app = create_app(None, api_key=options.api_key, served_model_name=name, with_metrics=options.enable_metrics)
    listener = Listener(app, options.host, options.port, access_log=options.log_level == "debug")
    listener.start()
    engine = None
    try:
        with _stop_signals():
            engine = start_engine(options.engine_options)
            engine.start()
            attach_engine(app, engine)
            print(f"podquant serves {name} at {listener.url} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
    except _StopSignal:
        print("stopping", file=sys.stderr, flush=True)
    finally:
        listener.close()
        if engine is not None:
            engine.stop(options.drain_seconds)
        listener.join(_LAST_WORDS_SECONDS)


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGINT raise _StopSignal; afterwards they end the process as ever."""

    def stop(number: int, frame: object) -> NoReturn:
        raise _StopSignal

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
