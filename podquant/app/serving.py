"""A model behind a port, from its first word to its last: listen, load, serve until told to stop, drain.

It serves from this process, or from those of a group on this host and others. Knows nothing of flags or signals.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from podquant.engine.backend import Backend
from podquant.engine.collection import sparing_what_is_there
from podquant.engine.options import EngineOptions
from podquant.engine.start import OnLoad, start_engine
from podquant.group.hosts import SharedFlags
from podquant.group.other_host import serve_host
from podquant.group.service import GroupOptions, GroupService
from podquant.server.app import attach_engine, create_app, tell_phase
from podquant.server.connections import raise_file_limit
from podquant.server.http_server import HttpServer

_LAST_WORDS_SECONDS = 5.0
"""For clients to read what is left once every request has ended."""


@dataclass(frozen=True)
class HttpOptions:
    """How callers reach the model.

    Attributes:
        host, port: to listen on; port 0 takes a free one.
        api_key: what callers must send; None asks for nothing.
        served_model_name: what callers call the model; None for its path.
        with_metrics: whether there is /metrics.
        access_log: log a line for each request.
        drain_seconds: how long requests in flight may continue at the end.
    """

    host: str = "127.0.0.1"
    port: int = 30000
    api_key: str | None = None
    served_model_name: str | None = None
    with_metrics: bool = True
    access_log: bool = False
    drain_seconds: float = 30.0


def serve(
    options: EngineOptions,
    http: HttpOptions,
    group: GroupOptions | None,
    is_stopped: threading.Event,
    on_ready: Callable[[str], None] = lambda url: None,
    on_load: OnLoad = lambda done, total: None,
) -> None:
    """Listen first, so that /health says how far it is; then load, and serve until `is_stopped` or an exception.

    Args:
        group: whose host 0 this is; None to serve from this process.
        on_ready: told the URL once requests are taken.
        on_load: told the bytes of the model that all hosts have read so far, and in all.

    Raises:
        PodquantError: the address or the model cannot be had, or the hosts do not come.
    """
    raise_file_limit()
    name = http.served_model_name or options.model_path
    app = create_app(None, api_key=http.api_key, served_model_name=name, with_metrics=http.with_metrics)
    server = HttpServer(app, http.host, http.port, access_log=http.access_log)
    server.start()

    def load(done: int, total: int) -> None:
        on_load(done, total)
        how_far = f"loading its weights, {done / 1e9:.2f} of {total / 1e9:.2f} GB"
        tell_phase(app, how_far if done < total else "compiling")

    try:
        with _backend(options, group, http.drain_seconds, server.close, load) as backend:
            if is_stopped.is_set():
                return
            attach_engine(app, backend)
            on_ready(server.url)
            with sparing_what_is_there():
                while not is_stopped.wait(0.2):
                    pass
    finally:
        server.close()
        server.join(_LAST_WORDS_SECONDS)


def serve_other_host(options: EngineOptions, group: GroupOptions, number: int, is_stopped: threading.Event) -> None:
    """Run the processes of another host than host 0, until that says to stop or `is_stopped` is set.

    Raises:
        ConfigError: host 0 was started with other flags.
        ClusterError: host 0 does not answer.
    """
    flags = SharedFlags(group.num_hosts, group.num_groups, options)
    serve_host(number, group.address, group.secret, flags, group.deadlines, is_stopped)


@contextmanager
def _backend(
    options: EngineOptions, group: GroupOptions | None, drain_seconds: float, close: Callable[[], None], on_load: OnLoad
) -> Iterator[Backend]:
    """The backend, ready; afterwards drained and gone. `close` is called before: no new requests while draining."""
    with ExitStack() as stack:
        if group is None:
            engine = start_engine(options, on_load)
            engine.start()
            stack.callback(engine.stop, drain_seconds)
            stack.callback(close)
            yield engine
            return
        service = GroupService(options, group, on_load)
        stack.callback(service.stop, drain_seconds)
        stack.callback(close)
        service.start()
        yield service.backend
