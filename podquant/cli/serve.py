"""`podquant serve MODEL`: load a model, answer HTTP, drain on SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from podquant.app.options import API_KEY_VARIABLE, SECRET_VARIABLE, ServeOptions, add_options, read_options
from podquant.app.source import worker_environment
from podquant.errors import ConfigError

if TYPE_CHECKING:
    from podquant.config.job import ServeJob
    from podquant.group.service import Members


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
    """Serve until a signal, on this host's part of the group if there are several. Call it in the main thread.

    Raises:
        PodquantError: the address, the model or the other hosts cannot be had.
    """
    from podquant.app import serving

    is_stopped = threading.Event()
    try:
        with _stop_signals():
            members = None
            if options.nnodes > 1 or options.dp_size > 1:
                members = options.members(os.environ.get(SECRET_VARIABLE, ""))
            if members is not None and options.node_rank > 0:
                serving.serve_other_host(options.engine_options, members, options.node_rank, is_stopped)
                return
            _serve_here(options, members, is_stopped)
    except _StopSignal:
        print("stopped", file=sys.stderr, flush=True)


def serve_options(job: ServeJob) -> ServeOptions:
    """The options behind a job. Raises ConfigError, naming the file, for what cannot be."""
    flags: dict[str, Any] = {"api_key": os.environ.get(API_KEY_VARIABLE), **job.flags}
    try:
        return ServeOptions(
            model_path=job.model,
            quantization_config_path=job.quantization_config_path,
            revision=job.revision,
            **flags,
        )
    except ConfigError as error:
        raise ConfigError(f"{job.name}: serve: {error}") from error


def check_source(options: ServeOptions, source: str, revision: str | None) -> None:
    """Find out whether what is converted from a checkpoint could be served as the options say, before it is converted.

    Raises:
        PodquantError: the checkpoint has no such model or tokenizer, or it cannot be cut into so many shards.
    """
    from podquant.engine.start import load_tokenizer, open_model

    engine_options = replace(options.engine_options, model_path=source, revision=revision, download_dir=None)
    with open_model(engine_options, by_ranges=True) as opened:
        load_tokenizer(opened)


def run_job(job: ServeJob, *, address: str) -> int:
    """Serve on the hosts of a Ray cluster until a signal. Call it in the main thread.

    Args:
        address: of the cluster, as `ray.init` takes it.
    """
    from podquant.cluster.ray_gang import RayGang
    from podquant.cluster.topology import parse_slice

    options = serve_options(job)
    accelerator = None if job.cluster.accelerator is None else parse_slice(job.cluster.accelerator)
    with RayGang(address, accelerator=accelerator, environment=worker_environment(job.cluster)) as gang:
        try:
            with _stop_signals():
                gang.run(partial(serve_on_host, options, secrets.token_hex(32)))
        except _StopSignal:
            gang.end(options.drain_seconds)
            print("stopped", file=sys.stderr, flush=True)
    return 0


def serve_on_host(
    options: ServeOptions,
    secret: str,
    rank: int,
    addresses: Sequence[str],
    port: int,
    is_stopped: threading.Event,
) -> None:
    """One host's part of `run_job`; its JAX is in a process of its own, also where there is one host only."""
    from podquant.app import serving

    options = replace(options, nnodes=len(addresses), node_rank=rank, dist_init_addr=f"{addresses[0]}:{port}")
    members = options.members(secret)
    if rank > 0:
        serving.serve_other_host(options.engine_options, members, rank, is_stopped)
        return
    _serve_here(options, members, is_stopped)


def _serve_here(options: ServeOptions, members: Members | None, is_stopped: threading.Event) -> None:
    """Serve as host 0, and say when, and how far it is before."""
    from podquant.app import serving
    from podquant.app.progress import LoadProgress

    name = options.served_model_name or options.model_path
    loading = LoadProgress("loading")

    def announce(url: str) -> None:
        loading.close()
        print(f"podquant serves {name} at {url} (Ctrl-C ends it)", flush=True)

    serving.serve(options.engine_options, options.http_options, members, is_stopped, announce, loading)


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
