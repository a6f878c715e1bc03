"""Connections that say nothing, or half of something: how long each may stay, and how many there may be.

uvicorn's protocol over h11, which bounds what a request's head may hold, with a deadline for the head from its first
byte, or from the connection's for the first request. Where there are too many connections, those that wait for a
request make room, the longest without one first; where none does, the newest is told to come back.
"""

from __future__ import annotations

import asyncio
import json
import resource
from dataclasses import dataclass
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from podquant.server.errors import RETRY, error_body

_MOST = 16384
_OTHER_FILES = 256
"""File descriptors that are left for what is not a connection: the model's files, other hosts, logs."""

_LINGER_SECONDS = 1.0
_MOST_LINGERING = 64


_PIECE = 4096
"""Bytes given to h11 at a time where they may be the lines of chunks, of each of which it makes an event."""

_FREE_LINES = 2048
_LEAST_LINE = 16
"""Bytes of a chunked body to a line of it, on the whole, once it has more than some: a chunk has two, and costs as much
time as tens of kilobytes do."""


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections there may be, and how long each may keep the server waiting.

    Attributes:
        most: connections; None for as many as this process may have files open, save some, up to 16 384.
        most_silent: of them that have not sent a whole request yet.
        head_seconds: for the head of a request, in all; for the first one from when the connection is there.
        stuck_seconds: how long a client that does not read may hold up what is sent to it.
    """

    most: int | None = None
    most_silent: int = 1024
    head_seconds: float = 15.0
    stuck_seconds: float = 120.0

    def number(self) -> int:
        """How many connections there may be."""
        if self.most is not None:
            return self.most
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return _MOST if files == resource.RLIM_INFINITY else max(min(_MOST, files - _OTHER_FILES), files // 2)


def raise_file_limit() -> None:
    """Let this process have as many files open as it may allow itself: a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def protocol_class(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """The protocol of one server's connections, for uvicorn."""

    class Connection(_Connection):
        room = _Room(limits)

    return Connection


class _Room:
    """The connections of one server."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._most = limits.number()
        self._all: set[_Connection] = set()
        self._silent: dict[_Connection, None] = {}  # as a set in the order in which they came
        self._idle: dict[_Connection, None] = {}
        self._num_lingering = 0

    def add(self, connection: _Connection) -> bool:
        """Take a connection in, if need be in place of one that waits for a request. Whether there was room."""
        if len(self._silent) >= self.limits.most_silent or len(self._all) >= self._most:
            waiting = next(iter(self._silent), None) or next(iter(self._idle), None)
            if waiting is None:
                return False
            self.drop(waiting)
            waiting.transport.abort()
        self._all.add(connection)
        self._silent[connection] = None
        return True

    def drop(self, connection: _Connection) -> None:
        """Forget a connection that ends."""
        self._all.discard(connection)
        self.busy(connection)

    def busy(self, connection: _Connection) -> None:
        """A connection has a request."""
        self._silent.pop(connection, None)
        self._idle.pop(connection, None)

    def idle(self, connection: _Connection) -> None:
        """A connection's request has been answered."""
        if connection in self._all:
            self._idle[connection] = None

    def may_linger(self) -> bool:
        """Whether one more that is refused may stay until it has read why."""
        return self._num_lingering < _MOST_LINGERING

    def linger(self, number: int) -> None:
        """So many more, or fewer, stay although they were refused."""
        self._num_lingering += number


REFUSALS = {
    "too_many_connections": (503, "This server has as many connections as it can; try again later."),
    "small_chunks": (400, "The body comes in too many small chunks; send larger ones."),
    "request_timeout": (408, "The head of the request took too long to come."),
}
"""What a connection is answered that never becomes a request: status and message, by code."""


class _Connection(H11Protocol):
    room: ClassVar[_Room]
    _is_refused = False
    _num_bytes = 0
    _num_lines = 0
    _deadline: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its parent has it
        super().connection_made(transport)
        if self.room.add(self):
            self._expect_head()
        else:
            self._refuse("too_many_connections")

    def data_received(self, data: bytes) -> None:
        start = 0
        while start < len(data):
            if self._is_refused or self.transport.is_closing():
                return
            piece = data[start:] if self._expects_plain_body() else data[start : start + _PIECE]
            if self._is_broken_up(piece):
                self._refuse("small_chunks")
                return
            super().data_received(piece)
            start += len(piece)
        if self._has_request():
            self._cancel_deadline()
            self.room.busy(self)
        elif not self.transport.is_closing():
            self._expect_head()

    def on_response_complete(self) -> None:
        if _too_many_lines(*_size(self.conn.trailing_data[0])):  # of what came before its turn
            self._refuse("small_chunks")
            return
        super().on_response_complete()
        if not self._has_request() and not self.transport.is_closing():
            self.room.idle(self)
            if self.conn.trailing_data[0]:  # the next head has begun
                self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(self.room.limits.stuck_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_stuck()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        self._cancel_stuck()
        self.room.drop(self)
        super().connection_lost(exc)

    def _is_broken_up(self, piece: bytes) -> bool:
        """Whether what came of a chunked body so far has more ends of lines, two a chunk, than chunks of use have."""
        if not self._has_request() or not self._is_chunked():
            self._num_bytes = self._num_lines = 0
            return False
        num_bytes, num_lines = _size(piece)
        self._num_bytes += num_bytes
        self._num_lines += num_lines
        return _too_many_lines(self._num_bytes, self._num_lines)

    def _expects_plain_body(self) -> bool:
        return self._has_request() and not self._is_chunked()

    def _is_chunked(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self.headers)

    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.room.limits.head_seconds, self._expire)

    def _expire(self) -> None:
        self._deadline = None
        self.room.drop(self)
        if self.conn.trailing_data[0]:
            self._refuse("request_timeout")
        else:
            self.transport.close()

    def _refuse(self, code: str) -> None:
        """Answer what was not asked, and close once that has had time to be read: unread input would undo it."""
        status, message = REFUSALS[code]
        self._is_refused = True
        if not self.room.may_linger():
            self.transport.abort()
            return
        self.transport.write(_answer(status, error_body(status, message, code=code)))
        self.transport.write_eof()
        self.room.linger(1)
        self.loop.call_later(_LINGER_SECONDS, self._end_linger)

    def _end_linger(self) -> None:
        self.room.linger(-1)
        self.transport.abort()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cancel_stuck(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None


def _size(data: bytes) -> tuple[int, int]:
    """Bytes and ends of lines."""
    return len(data), data.count(b"\r\n")


def _too_many_lines(num_bytes: int, num_lines: int) -> bool:
    return num_lines > _FREE_LINES + num_bytes // _LEAST_LINE


def _answer(status: int, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    reason = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}[status]
    headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), "Connection": "close"}
    if status == 503:
        headers |= RETRY
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + data
