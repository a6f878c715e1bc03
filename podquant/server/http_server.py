"""A socket and a uvicorn in a thread of its own, so that the main thread can load a model and wait for signals."""

from __future__ import annotations

import socket
import threading

import uvicorn
from starlette.types import ASGIApp

from podquant.errors import ConfigError
from podquant.server.connections import ConnectionLimits, protocol_class

_BACKLOG = 2048
"""Connections that the kernel keeps until they are accepted."""

_ACCEPTS = 16
"""Connections accepted in one round of the event loop, and attempts in it where there is no file descriptor left."""

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open: longer than proxies and clients keep theirs (60 s is usual), so that they
close first, and no request meets a connection that is being closed."""


class HttpServer:
    """Serves an app until it is told to stop.

    Args:
        app: what to serve.
        host, port: where; port 0 takes a free one.
        access_log: log a line for each request.
        limits: of its connections.

    Raises ConfigError if the address cannot be had.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        *,
        access_log: bool = False,
        limits: ConnectionLimits | None = None,
    ) -> None:
        self._socket = _bind(host, port)
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            app,
            http=protocol_class(limits or ConnectionLimits()),
            ws="none",
            backlog=_ACCEPTS,
            log_config=None,
            access_log=access_log,
            lifespan="on",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        self._server = _Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="http", daemon=True
        )

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Take no more connections; requests in flight continue. Returns at once."""
        self._server.should_exit = True

    def join(self, timeout: float) -> None:
        """After `close`: wait for the last response, and cut off what is not read by then."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join()


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen with another backlog: asyncio takes one number for this and for how often it accepts at a time."""
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_BACKLOG)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there: {error.strerror}; choose an address of this machine "
            "and a port that is free"
        ) from error
    return listening
