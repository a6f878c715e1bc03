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
from dataclasses import dataclass, field
from typing import Any, Self

from podquant.errors import ClusterError
from podquant.group.codec import Codec, MalformedError, encode
from podquant.group.messages import VERSION

MAX_BYTES = 64 << 20
"""Of one message: a longer one is an attack, or a fault."""

HANDSHAKE_SECONDS = 10.0

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
        """Shake hands, each part within `timeout`; `peer` is closed if that fails.

        Args:
            secret: that both ends know; None for a pair of sockets that nobody else has.

        Raises:
            VersionError: the other end speaks another version of the protocol; it is told this end's.
            WireError: the other end does not know the secret, or gave no answer in time.
        """
        self._socket, self._incoming = peer, incoming
        try:
            peer.settimeout(timeout)
            if peer.family != socket.AF_UNIX:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.address = _address(peer)
            self._send, self._receive = self._shake_hands(secret, is_server, timeout)
        except (OSError, WireError) as error:
            peer.close()
            if isinstance(error, WireError):
                raise
            raise WireError(f"{_address(peer)}: no handshake: {_reason(error)}") from error

    def send(self, message: object, *, timeout: float = 10.0) -> None:
        """Send a message of `messages`. Blocks while the network is full, `timeout` at most."""
        self.send_encoded(encode(message), timeout=timeout)

    def send_encoded(self, payload: bytes, *, timeout: float = 10.0) -> None:
        """Send what `encode` made: once, for several connections."""
        if len(payload) > MAX_BYTES:
            raise WireError(f"{self.address}: a message of {len(payload):,} bytes; the most is {MAX_BYTES:,}")
        try:
            with self._send.lock:
                frame = b"".join((_HEAD.pack(len(payload)), payload, self._send.mac(payload)))
                self._socket.settimeout(timeout)
                self._socket.sendall(frame)
        except OSError as error:
            self.close()
            raise WireError(f"{self.address}: cannot send: {_reason(error)}") from error

    def receive(self, *, timeout: float) -> M:
        """The next message. Waits `timeout` seconds at most for its next byte."""
        try:
            length = _HEAD.unpack(self._read(_HEAD.size, timeout))[0]
            if length > MAX_BYTES:
                raise WireError(f"{self.address}: announced a message of {length:,} bytes; the most is {MAX_BYTES:,}")
            payload = self._read(length, timeout)
            if self._receive.key is not None:
                mac = self._read(_MAC_BYTES, timeout)
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

    def _shake_hands(self, secret: bytes | None, is_server: bool, timeout: float) -> tuple[_Direction, _Direction]:
        mine = _MAGIC + bytes([VERSION]) + (b"" if secret is None else secrets.token_bytes(_NONCE_BYTES))
        self._socket.sendall(mine)
        theirs = bytes(self._read(len(mine), timeout))
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
        self._socket.sendall(hmac.digest(keys[me], b"proof", "sha256"))
        proof = self._read(_MAC_BYTES, timeout)
        if not hmac.compare_digest(proof, hmac.digest(keys[you], b"proof", "sha256")):
            raise WireError(f"{self.address}: does not know this group's secret: give all hosts the same one")
        return _Direction(keys[me]), _Direction(keys[you])

    def _read(self, count: int, timeout: float) -> bytearray:
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            self._socket.settimeout(timeout)
            got = self._socket.recv_into(view[done:])
            if got == 0:
                raise WireError(f"{self.address}: the other end has closed the connection")
            done += got
        return data


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
        except OSError:
            return None

    def close(self) -> None:
        """Take no more callers."""
        self._socket.close()


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
