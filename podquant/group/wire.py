"""Connections between the processes of a service: in order, whole, of one protocol version, never without a deadline.

Between hosts they are authenticated: both ends prove that they know a secret before anything else is read, and every
message carries an HMAC-SHA256 over its place in the sequence, so a stranger can neither send nor change, repeat or drop
a message unnoticed. Nothing is encrypted: prompts and tokens travel as they are, inside the network of the hosts. On a
pair of sockets that only two processes of this host have there is nothing to prove. Knows no message by name.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from podquant.errors import ClusterError
from podquant.group.codec import Codec, MalformedError, encode
from podquant.group.messages import VERSION

MAX_BYTES = 64 << 20
"""Of one message: a longer one is an attack, or a fault."""

HANDSHAKE_SECONDS = 10.0
"""For all of a handshake."""

_MOST_SHAKING_HANDS = 64
"""Callers at a time that have proved nothing yet; one more ends the oldest, who is hardly one of ours: a handshake
takes milliseconds."""

_REST_SECONDS = 0.1
"""After a failure to take a caller: one that lasts, as when there are no file descriptors, would keep a core busy."""

_MAGIC = b"podquant"
_NONCE_BYTES = 32
_MAC_BYTES = 32
_HEAD = struct.Struct(">I")


class WireError(ClusterError):
    """The other end is gone, silent for too long, a stranger, or does not follow the protocol."""


class VersionError(WireError):
    """The other end speaks another version of the protocol."""


@dataclass
class _Direction:
    """One direction of a connection: its key (None: nobody could interfere), and how many messages it has carried."""

    key: bytes | None = None
    count: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def mac(self, payload: bytes | bytearray) -> bytes:
        """Of the next message."""
        if self.key is None:
            return b""
        self.count += 1
        return hmac.digest(self.key, struct.pack(">Q", self.count) + payload, "sha256")


class Connection[M]:
    """One end of a connection, on which messages M arrive. One thread may receive while others send.

    Every method raises WireError, after which the connection is closed.
    """

    def __init__(
        self,
        peer: socket.socket,
        incoming: Codec[M],
        secret: bytes | None,
        *,
        is_server: bool = False,
        timeout: float = HANDSHAKE_SECONDS,
    ) -> None:
        """Shake hands within `timeout` seconds; `peer` is closed if that fails.

        Args:
            secret: that both ends know; None for a pair of sockets that nobody else has.

        Raises:
            VersionError: the other end speaks another version of the protocol; it is told this end's.
            WireError: the other end does not know the secret, or gave no answer in time.
        """
        self._socket, self._incoming = peer, incoming
        try:
            if peer.family != socket.AF_UNIX:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.address = _address(peer)
            self._send, self._receive = self._shake_hands(secret, is_server, _Deadline(timeout))
        except (OSError, WireError) as error:
            peer.close()
            if isinstance(error, WireError):
                raise
            raise WireError(f"{_address(peer)}: no handshake: {_reason(error)}") from error

    def send(self, message: object, *, timeout: float = 10.0) -> None:
        """Send a message of `messages`. Waits `timeout` seconds at most for the network to take more of it."""
        self.send_encoded(encode(message), timeout=timeout)

    def send_encoded(self, payload: bytes, *, timeout: float = 10.0) -> None:
        """Send what `encode` made: once, for several connections."""
        if len(payload) > MAX_BYTES:
            raise WireError(f"{self.address}: a message of {len(payload):,} bytes; the most is {MAX_BYTES:,}")
        try:
            with self._send.lock:
                frame = memoryview(b"".join((_HEAD.pack(len(payload)), payload, self._send.mac(payload))))
                while frame:  # however long it is, the other end lives as long as it takes some of it
                    self._socket.settimeout(timeout)
                    frame = frame[self._socket.send(frame) :]
        except OSError as error:
            self.close()
            raise WireError(f"{self.address}: cannot send: {_reason(error)}") from error

    def receive(self, *, timeout: float) -> M:
        """The next message. Waits `timeout` seconds at most for its next byte."""
        try:
            length = _HEAD.unpack(self._read(_HEAD.size, lambda: timeout))[0]
            if length > MAX_BYTES:
                raise WireError(f"{self.address}: announced a message of {length:,} bytes; the most is {MAX_BYTES:,}")
            payload = self._read(length, lambda: timeout)
            if self._receive.key is not None:
                mac = self._read(_MAC_BYTES, lambda: timeout)
                if not hmac.compare_digest(mac, self._receive.mac(payload)):
                    raise WireError(f"{self.address}: a message was changed in transit, or is not from the other end")
            return self._incoming.decode(payload)
        except OSError as error:
            self.close()
            raise WireError(f"{self.address}: {_reason(error)}") from error
        except MalformedError as error:
            self.close()
            raise WireError(f"{self.address}: malformed message: {error}") from error
        except WireError:
            self.close()
            raise

    def unexpected(self, message: object) -> WireError:
        """The error for a message that comes at the wrong time; closes the connection."""
        self.close()
        return WireError(f"{self.address}: did not expect the message {type(message).__name__} now")

    def close(self) -> None:
        """End it, also for a thread that waits in `receive`. Again: no effect."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shake_hands(
        self, secret: bytes | None, is_server: bool, deadline: Callable[[], float]
    ) -> tuple[_Direction, _Direction]:
        mine = _MAGIC + bytes([VERSION]) + (b"" if secret is None else secrets.token_bytes(_NONCE_BYTES))
        self._write(mine, deadline)
        theirs = bytes(self._read(len(mine), deadline))
        if not theirs.startswith(_MAGIC):
            raise WireError(f"{self.address}: does not speak podquant's protocol")
        if (version := theirs[len(_MAGIC)]) != VERSION:
            raise VersionError(
                f"{self.address}: speaks version {version} of podquant's protocol, this process version {VERSION}: "
                "install the same podquant on all hosts, and restart them"
            )
        if secret is None:
            return _Direction(), _Direction()
        both = theirs + mine if is_server else mine + theirs
        keys = {name: hmac.digest(secret, name.encode() + both, "sha256") for name in ("client", "server")}
        me, you = ("server", "client") if is_server else ("client", "server")
        own_proof, expected = (hmac.digest(keys[name], b"proof", "sha256") for name in (me, you))
        if not is_server:  # who calls proves it first: a stranger gets nothing to guess secrets with
            self._write(own_proof, deadline)
        try:
            proof = self._read(_MAC_BYTES, deadline)
        except _ClosedError as error:
            if is_server:
                raise
            raise WireError(f"{error}: it does not know this group's secret: give all hosts the same one") from error
        if not hmac.compare_digest(proof, expected):
            raise WireError(f"{self.address}: does not know this group's secret: give all hosts the same one")
        if is_server:
            self._write(own_proof, deadline)
        return _Direction(keys[me]), _Direction(keys[you])

    def _write(self, data: bytes, wait: Callable[[], float]) -> None:
        self._socket.settimeout(wait())
        self._socket.sendall(data)

    def _read(self, count: int, wait: Callable[[], float]) -> bytearray:
        """So many bytes; `wait` tells how long the next of them may take."""
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            self._socket.settimeout(wait())
            got = self._socket.recv_into(view[done:])
            if got == 0:
                raise _ClosedError(f"{self.address}: the other end has closed the connection")
            done += got
        return data


class _ClosedError(WireError):
    """The other end has closed the connection."""


class _Deadline:
    """Seconds that are left; raises TimeoutError when there are none."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def __call__(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class PeerListener:
    """A TCP port for the other processes of a service."""

    def __init__(self, host: str, port: int) -> None:
        """Port 0 takes a free one. Raises ClusterError if the address cannot be had."""
        try:
            self._socket = socket.create_server((host, port), backlog=128)
        except OSError as error:
            raise ClusterError(
                f"{host}:{port}: cannot listen there for the other hosts: {_reason(error)}. Choose an address of this "
                "machine and a free port"
            ) from error
        self.port: int = self._socket.getsockname()[1]

    def accept(self, *, timeout: float) -> socket.socket | None:
        """The next caller, who has proved nothing yet; None if there is none in time or the listener is closed."""
        try:
            self._socket.settimeout(timeout)
            return self._socket.accept()[0]
        except TimeoutError:
            return None
        except OSError:
            time.sleep(min(timeout, _REST_SECONDS))
            return None

    def close(self) -> None:
        """Take no more callers."""
        self._socket.close()


class Reception[M]:
    """Shakes hands with those who call a listener, each in a thread: a stranger who says nothing holds up nobody.

    Args:
        welcome: is given the connection of each caller who knows the secret, in the caller's thread.
        refuse: is told of each who does not, and of what `welcome` raises.
    """

    def __init__(
        self,
        listener: PeerListener,
        incoming: Codec[M],
        secret: bytes,
        welcome: Callable[[Connection[M]], None],
        refuse: Callable[[WireError], None],
    ) -> None:
        self._listener, self._incoming, self._secret = listener, incoming, secret
        self._welcome, self._refuse = welcome, refuse
        self._lock = threading.Lock()
        self._shaking_hands: dict[socket.socket, None] = {}

    def take_in(self, *, timeout: float) -> None:
        """The next caller, if there is one in time."""
        peer = self._listener.accept(timeout=timeout)
        if peer is None:
            return
        with self._lock:
            if len(self._shaking_hands) >= _MOST_SHAKING_HANDS:
                oldest = next(iter(self._shaking_hands))
                del self._shaking_hands[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread closes it
            self._shaking_hands[peer] = None
        try:
            threading.Thread(target=self._receive, args=(peer,), name="caller", daemon=True).start()
        except RuntimeError:  # no more threads: this caller is not heard, and calls again
            self._forget(peer)
            peer.close()
            time.sleep(_REST_SECONDS)

    def _receive(self, peer: socket.socket) -> None:
        try:
            try:
                connection = Connection(peer, self._incoming, self._secret, is_server=True)
            finally:
                self._forget(peer)
            self._welcome(connection)
        except WireError as error:
            self._refuse(error)

    def _forget(self, peer: socket.socket) -> None:
        with self._lock:
            self._shaking_hands.pop(peer, None)


def connect[M](address: tuple[str, int], incoming: Codec[M], secret: bytes, *, timeout: float) -> Connection[M]:
    """Call a listener. Raises WireError: it is not there, speaks another version, or does not know the secret."""
    try:
        peer = socket.create_connection(address, timeout)
    except OSError as error:
        raise WireError(f"{address[0]}:{address[1]}: cannot connect: {_reason(error)}") from error
    return Connection(peer, incoming, secret)


def _address(peer: socket.socket) -> str:
    try:
        name: Any = peer.getpeername()
    except OSError:
        return "a caller that has gone"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "a process of this host"


def _reason(error: OSError) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
