"""Serving as its options say: this process, this host's part of several hosts, or host 0 of them, until a signal."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from podquant.app import serving
from podquant.app.options import API_KEY_VARIABLE, SECRET_VARIABLE, ServeOptions
from podquant.app.progress import LoadProgress
from podquant.app.serving import HttpOptions
from podquant.app.signals import StopSignal, raising_stop
from podquant.config.job import ServeJob
from podquant.engine.options import EngineOptions, detect_device
from podquant.engine.start import load_defaults, load_tokenizer, open_model
from podquant.errors import ConfigError
from podquant.group.launch import Deadlines
from podquant.group.service import GroupOptions

_LEAST_SECRET = 16


def serve(options: ServeOptions) -> None:
    """Serve until a signal, on this host's part of the group if there are several. Call it in the main thread.

    Raises:
        PodquantError: the address, the model or the other hosts cannot be had.
        SystemExit: a signal came: 143 for SIGTERM, 130 for Ctrl-C.
    """
    is_stopped = threading.Event()
    try:
        with raising_stop(is_stopped):
            group = None
            if options.nnodes > 1 or options.dp_size > 1:
                group = group_options(options, os.environ.get(SECRET_VARIABLE, ""))
            serve_part(options, group, is_stopped)
    except StopSignal as stop:
        print("stopped", file=sys.stderr, flush=True)
        raise SystemExit(stop.status) from None


def serve_part(options: ServeOptions, group: GroupOptions | None, is_stopped: threading.Event) -> None:
    """Serve as the host that `options.node_rank` says, until it is to stop. Host 0 says when it serves.

    Args:
        group: None to serve from this process.
    """
    if group is not None and options.node_rank > 0:
        serving.serve_other_host(engine_options(options), group, options.node_rank, is_stopped)
        return
    options = replace(options, api_key=read_api_key(options), api_key_file=None)
    require_key_where_others_reach(options)
    name = options.served_model_name or options.model_path
    loading = LoadProgress("loading")

    def announce(url: str) -> None:
        loading.close()
        print(f"podquant serves {name} at {url} (Ctrl-C ends it)", flush=True)

    serving.serve(engine_options(options), http_options(options), group, is_stopped, announce, loading)


def read_api_key(options: ServeOptions) -> str | None:
    """What callers must send: as the options say, as their file says, or else this process's environment.

    Raises:
        ConfigError: the file cannot be read, or does not hold one key.
    """
    if options.api_key_file is None:
        key = options.api_key or os.environ.get(API_KEY_VARIABLE)
        if key == "":
            raise ConfigError(f"{API_KEY_VARIABLE}: is set and empty: give it a key, or unset it to serve anybody")
        return key
    try:
        key = Path(options.api_key_file).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it holds bytes that no header can"
        raise ConfigError(
            f"--api-key-file {options.api_key_file}: cannot be read as a key: {reason}. Mount the Secret there, on the "
            "host that answers HTTP"
        ) from error
    if not key or not key.isprintable() or " " in key:
        raise ConfigError(
            f"--api-key-file {options.api_key_file}: expected one key of printable characters without spaces, got "
            f"{f'{len(key.split())} words' if key else 'an empty file'}. Make one with `openssl rand -hex 32`"
        )
    return key


def require_key_where_others_reach(options: ServeOptions) -> None:
    """Raises ConfigError if other machines reach the server, no key is asked for, and nobody has said that it is meant.

    Args:
        options: with the key, if there is any.
    """
    if options.api_key is not None or options.allow_anonymous:
        return
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
    except OSError:
        return  # whoever listens there will say so
    addresses = [str(address[0]).partition("%")[0] for *_, address in found]
    if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        raise ConfigError(
            f"--host {options.host}: other machines reach the server there, and it asks for no API key. Set "
            f"{API_KEY_VARIABLE} (make one with `openssl rand -hex 32`) or --api-key-file, listen on 127.0.0.1, or say "
            "--allow-anonymous to answer whoever comes"
        )


def check_source(options: ServeOptions, source: str, revision: str | None) -> None:
    """Find out whether what is converted from a checkpoint could be served as the options say, before it is converted.

    Raises:
        PodquantError: the checkpoint has no such model or tokenizer, it cannot be cut into so many shards, or the
            defaults of sampling are not where the options say.
    """
    asked = replace(engine_options(options), model_path=source, revision=revision, download_dir=None)
    with open_model(asked, by_ranges=True) as opened:
        load_tokenizer(opened)
        load_defaults(opened)


def options_of(job: ServeJob) -> ServeOptions:
    """The options behind a job; the key is the hosts' own. Raises ConfigError, naming the file, for what cannot be."""
    flags: dict[str, Any] = dict(job.flags)
    try:
        return ServeOptions(
            model_path=job.model,
            quantization_config_path=job.quantization_config_path,
            revision=job.revision,
            **flags,
        )
    except ConfigError as error:
        raise ConfigError(f"{job.name}: serve: {error}") from error


def group_options(options: ServeOptions, secret: str) -> GroupOptions:
    """The hosts that serve together.

    Args:
        secret: what all of them know; may be empty where there is one host.

    Raises:
        ConfigError: several hosts without a secret, or --dp-size and --nnodes do not divide one another.
    """
    if options.nnodes > 1 and len(secret) < _LEAST_SECRET:
        raise ConfigError(
            f"{SECRET_VARIABLE}: several hosts need a secret of {_LEAST_SECRET} characters or more that all of "
            "them have, so that no stranger joins them: make one with `openssl rand -hex 32`"
        )
    host, _, port = (options.dist_init_addr or "127.0.0.1:0").rpartition(":")
    if options.nnodes > 1 and host in ("", "0.0.0.0", "::", "[::]"):
        raise ConfigError(
            f"--dist-init-addr {options.dist_init_addr}: expected host 0's own address, which the other hosts call"
        )
    deadlines = Deadlines(
        options.liveness_seconds,
        options.step_seconds,
        options.arrival_seconds,
        options.start_seconds,
        options.drain_seconds,
    )
    key = (secret or secrets.token_hex(32)).encode()
    address = host.strip("[]"), int(port)
    return GroupOptions(options.nnodes, options.dp_size, address, key, deadlines, options.max_failed_starts)


def http_options(options: ServeOptions) -> HttpOptions:
    """The server's part of the options."""
    return HttpOptions(
        host=options.host,
        port=options.port,
        api_key=options.api_key,
        served_model_name=options.served_model_name,
        with_metrics=options.enable_metrics,
        access_log=options.log_level == "debug",
        drain_seconds=options.drain_seconds,
    )


def engine_options(options: ServeOptions) -> EngineOptions:
    """The engine's part of the options: they have its names, and two say more than it takes."""
    own: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(EngineOptions)}
    own["device"] = options.device or detect_device()
    if (most := options.max_prefill_tokens) is not None:
        most = 1 << (most.bit_length() - 1)
        own["chunked_prefill_size"] = min(options.chunked_prefill_size or most, most)
    return EngineOptions(**own)
