"""Messages between the processes of a group: over TCP, authenticated, in plain data, never without a deadline.

Both ends prove that they know a secret before anything else is read, and every message carries an HMAC-SHA256 over its
place in the sequence, so a stranger can neither speak nor change, repeat or drop a message unnoticed. Nothing is
encrypted: prompts and tokens travel as they are, inside the network of the hosts. A message is JSON and, behind it, the
bytes of NumPy arrays; nothing received is ever executed or unpickled. Knows nothing of what messages mean.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from podquant.errors import ClusterError

VERSION = 1
"""Of the protocol; others are refused."""

MOST_BYTES = 64 << 20
"""Of one message: a longer one is an attack, or a fault."""

HANDSHAKE_SECONDS = 10.0

_MAGIC = b"podquant"
_NONCE_BYTES = 32
_MAC_BYTES = 32
_HEAD = struct.Struct(">I")
_DTYPES = {"int32": np.dtype(np.int32), "float32": np.dtype(np.float32)}

Array = npt.NDArray[Any]


class WireError(ClusterError):
    """The other end is gone, silent for too long, a stranger, or does not keep to the protocol."""


@dataclass(frozen=True)
class Message:
    """What came: JSON's values, and arrays."""

    body: dict[str, Any]
    arrays: tuple[Array, ...] = ()


@dataclass
class _Way:
    """One direction of a connection: its key, and how many messages it has carried."""

    key: bytes
    count: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def mac(self, payload: bytes | bytearray) -> bytes:
        """Of the next message."""
        self.count += 1
        return hmac.digest(self.key, struct.pack(">Q", self.count) + payload, "sha256")


class Connection:
    """One end of an authenticated connection. One thread may receive while others send.

    Every method raises WireError, after which the connection is closed.
    """

    def __init__(
        self, peer: socket.socket, secret: bytes, *, is_server: bool, timeout: float = HANDSHAKE_SECONDS
    ) -> None:
        """Shake hands, each part within `timeout`; `peer` is closed if that fails.

        Raises:
            WireError: the other end does not know the secret, or gave no answer in time.
        """
        self._socket = peer
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

    def send(self, body: Mapping[str, Any], arrays: Sequence[Array] = (), *, timeout: float = 10.0) -> None:
        """Send a message; arrays must be int32 or float32. Blocks while the network is full, `timeout` at most."""
        self.send_encoded(encode(body, arrays), timeout=timeout)

    def send_encoded(self, payload: bytes, *, timeout: float = 10.0) -> None:
        """Send what `encode` made: once, for several connections."""
        if len(payload) > MOST_BYTES:
            raise WireError(f"{self.address}: a message of {len(payload):,} bytes; the most is {MOST_BYTES:,}")
        try:
            with self._send.lock:
                frame = b"".join((_HEAD.pack(len(payload)), payload, self._send.mac(payload)))
                self._socket.settimeout(timeout)
                self._socket.sendall(frame)
        except OSError as error:
            self.close()
            raise WireError(f"{self.address}: cannot send: {_reason(error)}") from error

    def receive(self, *, timeout: float) -> Message:
        """The next message. Waits `timeout` seconds at most for its next byte."""
        try:
            length = _HEAD.unpack(self._read(_HEAD.size, timeout))[0]
            if length > MOST_BYTES:
                raise WireError(f"{self.address}: announced a message of {length:,} bytes; the most is {MOST_BYTES:,}")
            payload = self._read(length, timeout)
            if not hmac.compare_digest(self._read(_MAC_BYTES, timeout), self._receive.mac(payload)):
                raise WireError(f"{self.address}: a message that was changed on the way, or is not from the other end")
            return _decode(payload, self.address)
        except OSError as error:
            self.close()
            raise WireError(f"{self.address}: {_reason(error)}") from error
        except WireError:
            self.close()
            raise

    def close(self) -> None:
        """End it, also for a thread that waits in `receive`. Again: no effect."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shake_hands(self, secret: bytes, is_server: bool, timeout: float) -> tuple[_Way, _Way]:
        mine = _MAGIC + bytes([VERSION]) + secrets.token_bytes(_NONCE_BYTES)
        self._socket.sendall(mine)
        theirs = bytes(self._read(len(mine), timeout))
        if not theirs.startswith(_MAGIC):
            raise WireError(f"{self.address}: does not speak podquant's protocol")
        if theirs[len(_MAGIC)] != VERSION:
            raise WireError(
                f"{self.address}: speaks version {theirs[len(_MAGIC)]} of the protocol, this is {VERSION}: install the "
                "same podquant on all hosts"
            )
        both = theirs + mine if is_server else mine + theirs
        keys = {name: hmac.digest(secret, name.encode() + both, "sha256") for name in ("client", "server")}
        me, you = ("server", "client") if is_server else ("client", "server")
        self._socket.sendall(hmac.digest(keys[me], b"proof", "sha256"))
        proof = self._read(_MAC_BYTES, timeout)
        if not hmac.compare_digest(proof, hmac.digest(keys[you], b"proof", "sha256")):
            raise WireError(f"{self.address}: does not know this group's secret: give all hosts the same one")
        return _Way(keys[me]), _Way(keys[you])

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


class Listener:
    """A TCP port for the other members of a group."""

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


def connect(address: tuple[str, int], secret: bytes, *, timeout: float) -> Connection:
    """Call a listener. Raises WireError: it is not there, or does not know the secret."""
    try:
        peer = socket.create_connection(address, timeout)
    except OSError as error:
        raise WireError(f"{address[0]}:{address[1]}: cannot connect: {_reason(error)}") from error
    return Connection(peer, secret, is_server=False)


def encode(body: Mapping[str, Any], arrays: Sequence[Array] = ()) -> bytes:
    """A message as bytes: JSON with the arrays' types and shapes, and behind it their own."""
    described = [[array.dtype.name, list(array.shape)] for array in arrays]
    head = json.dumps([body, described], separators=(",", ":")).encode()
    return b"".join([_HEAD.pack(len(head)), head, *(np.ascontiguousarray(array).tobytes() for array in arrays)])


def _decode(payload: bytearray, address: str) -> Message:
    try:
        size = _HEAD.unpack_from(payload)[0]
        body, described = json.loads(payload[_HEAD.size : _HEAD.size + size])
        if not isinstance(body, dict):
            raise TypeError("a message is an object")
        arrays, offset = [], _HEAD.size + size
        for name, shape in described:
            dtype = _DTYPES[name]
            count = int(np.prod(shape, dtype=np.int64))
            arrays.append(np.frombuffer(payload, dtype, count, offset).reshape(shape))
            offset += count * dtype.itemsize
        if offset != len(payload):
            raise ValueError(f"{len(payload) - offset} bytes more than announced")
    except (ValueError, TypeError, KeyError, struct.error) as error:
        raise WireError(f"{address}: a message that is none of this protocol: {error}") from error
    return Message(body, tuple(arrays))


def _address(peer: socket.socket) -> str:
    try:
        name = peer.getpeername()
    except OSError:
        return "a caller that has gone"
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "a process of this host"


def _reason(error: OSError) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
