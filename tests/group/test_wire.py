"""Connections between processes: who may speak, what arrives, and that nothing waits for ever."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from podquant.errors import ClusterError
from podquant.group import wire
from podquant.group.wire import Connection, Listener, WireError, connect

SECRET = b"correct horse battery staple"


@contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """A listener that gives its first caller to `serve`, in a thread."""
    listener = Listener("127.0.0.1", 0)

    def run() -> None:
        peer = listener.accept(timeout=10)
        assert peer is not None
        serve(peer)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield "127.0.0.1", listener.port
    finally:
        thread.join(20)
        listener.close()


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Connection]]:
    ends: list[Connection] = []
    with serving(lambda peer: ends.append(Connection(peer, SECRET, is_server=True))) as address:
        client = connect(address, SECRET, timeout=5)
    with client, ends[0]:
        yield client, ends[0]


def test_values_and_arrays_arrive_as_they_were_both_ways(pair: tuple[Connection, Connection]) -> None:
    ints = np.arange(12, dtype=np.int32).reshape(3, 4)
    floats = np.array([[1.5, -0.1]], np.float32)
    for sender, receiver in (pair, pair[::-1]):
        for number in range(3):
            sender.send({"step": number, "text": "ü\0", "probability": 0.1}, [ints, floats[:, ::-1], ints[:0]])
        for number in range(3):
            message = receiver.receive(timeout=5)
            assert message.body == {"step": number, "text": "ü\0", "probability": 0.1}
            assert [array.tolist() for array in message.arrays] == [ints.tolist(), floats[:, ::-1].tolist(), []]
            assert [array.dtype for array in message.arrays] == [np.int32, np.float32, np.int32]


def test_who_does_not_know_the_secret_is_refused_by_either_end() -> None:
    refusals: list[str] = []

    def serve(peer: socket.socket) -> None:
        with pytest.raises(WireError) as caught:
            Connection(peer, SECRET, is_server=True)
        refusals.append(str(caught.value))

    with serving(serve) as address, pytest.raises(WireError, match="does not know this group's secret"):
        connect(address, b"guessed", timeout=5)
    assert "does not know this group's secret" in refusals[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b" " * 41, "does not speak podquant's protocol"),
        (b"podquant\x63" + b"\0" * 32, "speaks version 99 of the protocol, this is 1"),
        (b"pod", "no answer in time"),
    ],
)
def test_strangers_are_refused_in_time(data: bytes, message: str) -> None:
    with serving(lambda peer: check(peer, message)) as address, socket.create_connection(address, 5) as stranger:
        stranger.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass


def check(peer: socket.socket, message: str) -> None:
    with pytest.raises(WireError, match=message):
        Connection(peer, SECRET, is_server=True, timeout=0.3)


@contextmanager
def tapped(change: Callable[[bytes], bytes]) -> Iterator[tuple[Connection, Connection]]:
    """Two ends with someone between them who passes on what `change` makes of each message of the client's."""
    ours, theirs = socket.socketpair()
    left, right = socket.socketpair()

    def pass_on(source: socket.socket, target: socket.socket, alter: Callable[[bytes], bytes]) -> None:
        handshake = 41 + 32  # a greeting and a proof
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                first, data = data[:handshake], data[handshake:]
                handshake -= len(first)
                target.sendall(first + (alter(data) if data else b""))
        target.close()

    threads = [
        threading.Thread(target=pass_on, args=(theirs, left, change), daemon=True),
        threading.Thread(target=pass_on, args=(left, theirs, lambda data: data), daemon=True),
    ]
    for thread in threads:
        thread.start()
    ends: list[Connection] = []
    server = threading.Thread(target=lambda: ends.append(Connection(right, SECRET, is_server=True)))
    server.start()
    with Connection(ours, SECRET, is_server=False) as client:
        server.join()
        with ends[0]:
            yield client, ends[0]
    for thread in threads:
        thread.join(10)


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data.replace(b'"to":1', b'"to":2')],
)
def test_a_message_that_was_changed_is_refused(change: Callable[[bytes], bytes]) -> None:
    with tapped(change) as (client, server):
        client.send({"to": 1})
        with pytest.raises(WireError, match="changed on the way"):
            server.receive(timeout=5)


def test_a_message_that_is_repeated_is_refused() -> None:
    with tapped(lambda data: data + data) as (client, server):
        client.send({"to": 1})
        assert server.receive(timeout=5).body == {"to": 1}
        with pytest.raises(WireError, match="changed on the way"):
            server.receive(timeout=5)


def test_a_length_that_is_too_large_is_not_waited_for() -> None:
    with tapped(lambda data: struct.pack(">I", wire.MOST_BYTES + 1) + data[4:]) as (client, server):
        client.send({})
        with pytest.raises(WireError, match="announced a message of 67,108,865 bytes"):
            server.receive(timeout=5)


def test_silence_and_an_end_are_told(pair: tuple[Connection, Connection]) -> None:
    client, server = pair
    with pytest.raises(WireError, match="no answer in time"):
        server.receive(timeout=0.1)
    with pytest.raises(WireError, match="closed the connection"):
        client.receive(timeout=5)
    with pytest.raises(WireError, match="cannot send"):
        client.send({"to": "nobody"})


def test_a_port_that_is_taken_is_named() -> None:
    listener = Listener("127.0.0.1", 0)
    with pytest.raises(ClusterError, match=rf"127.0.0.1:{listener.port}: cannot listen there.*in use"):
        Listener("127.0.0.1", listener.port)
    listener.close()
    with pytest.raises(WireError, match="cannot connect"):
        connect(("127.0.0.1", listener.port), SECRET, timeout=1)
