"""Messages between a process and one that it has started, on their socket: a kind, a length, and so many bytes.

Knows nothing of what they say.
"""

from __future__ import annotations

import math
import socket
import struct
import time

_HEAD = struct.Struct("<BQ")


def send(connection: socket.socket, kind: int, data: bytes) -> None:
    """Send one message. Raises OSError, TimeoutError if the socket's own timeout runs out."""
    connection.sendall(_HEAD.pack(kind, len(data)))
    connection.sendall(data)


def receive(connection: socket.socket, most: int, deadline: float = math.inf) -> tuple[int, bytearray]:
    """The kind and the bytes of the next message.

    Args:
        most: bytes of it.
        deadline: of all of it, by the monotonic clock.

    Raises:
        OSError: the socket is closed, or the message longer; TimeoutError if it is not there in time.
    """
    kind, size = _HEAD.unpack(_bytes(connection, _HEAD.size, deadline))
    if size > most:
        raise ConnectionError(f"a message of {size} bytes, more than {most}")
    return kind, _bytes(connection, size, deadline)


def _bytes(connection: socket.socket, size: int, deadline: float) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        left = deadline - time.monotonic()
        connection.settimeout(None if left == math.inf else max(left, 1e-3))
        number = connection.recv_into(view)
        if not number:
            raise ConnectionError("the process has ended")
        view = view[number:]
    return data
