"""Connections between processes: who may speak, what arrives, and that nothing waits for ever."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

from podquant.errors import ClusterError
from podquant.group import wire
from podquant.group.codec import Array, Codec
from podquant.group.messages import VERSION
from podquant.group.wire import Connection, PeerListener, Reception, VersionError, WireError, connect
from tests.group.hosts import wait_until

SECRET = b"correct horse battery staple"


@dataclass(frozen=True)
class Note:
    """A message of these tests."""

    number: int
    text: str = ""
    arrays: tuple[Array, ...] = ()


NOTES: Codec[Note] = Codec(Note)
Pair = tuple[Connection[Note], Connection[Note]]


@contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
    """A listener that gives its first caller to `serve`, in a thread."""
    listener = PeerListener("127.0.0.1", 0)

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
def pair() -> Iterator[Pair]:
    ends: list[Connection[Note]] = []
    with serving(lambda peer: ends.append(Connection(peer, NOTES, SECRET, is_server=True))) as address:
        client = connect(address, NOTES, SECRET, timeout=5)
    with client, ends[0]:
        yield client, ends[0]


def test_messages_arrive_as_they_were_both_ways(pair: Pair) -> None:
    ints = np.arange(12, dtype=np.int32).reshape(3, 4)
    floats = np.array([[1.5, -0.1]], np.float32)
    for sender, receiver in (pair, pair[::-1]):
        for number in range(3):
            sender.send(Note(number, "ü\0", (ints, floats[:, ::-1], ints[:0])))
        for number in range(3):
            note = receiver.receive(timeout=5)
            assert (note.number, note.text) == (number, "ü\0")
            assert [array.tolist() for array in note.arrays] == [ints.tolist(), floats[:, ::-1].tolist(), []]
            assert [array.dtype for array in note.arrays] == [np.int32, np.float32, np.int32]


def private_pair(timeout: float = 5.0) -> Pair:
    """Of two ends of a socket pair, as a host and a process of it have them."""
    left, right = socket.socketpair()
    ends: list[Connection[Note]] = []
    thread = threading.Thread(target=lambda: ends.append(Connection(left, NOTES, None, timeout=timeout)))
    thread.start()
    other = Connection(right, NOTES, None, timeout=timeout)
    thread.join()
    return ends[0], other


def test_a_private_pair_proves_nothing_and_carries_the_same() -> None:
    left, right = private_pair()
    with left, right:
        for sender, receiver in ((left, right), (right, left)):
            sender.send(Note(1))
            sender.send(Note(2, "second"))
            assert [receiver.receive(timeout=5) for _ in range(2)] == [Note(1), Note(2, "second")]
        left.close()
        with pytest.raises(WireError, match="a process of this host: the other end has closed the connection"):
            right.receive(timeout=5)


@dataclass(frozen=True)
class Stranger:
    """A message that Codec(Note) does not have."""


def test_a_message_of_another_kind_ends_the_connection(pair: Pair) -> None:
    client, server = pair
    client.send(Stranger())
    with pytest.raises(WireError, match="malformed message: message 'Stranger': unknown here, expected one of Note"):
        server.receive(timeout=5)
    with pytest.raises(WireError):
        server.send(Note(1))


def test_a_message_at_the_wrong_time_ends_the_connection(pair: Pair) -> None:
    client, server = pair
    assert str(server.unexpected(Note(1))).endswith("did not expect the message Note now")
    with pytest.raises(WireError, match="closed the connection"):
        client.receive(timeout=5)


def test_who_does_not_know_the_secret_is_refused_by_either_end() -> None:
    refusals: list[str] = []

    def serve(peer: socket.socket) -> None:
        with pytest.raises(WireError) as caught:
            Connection(peer, NOTES, SECRET, is_server=True)
        refusals.append(str(caught.value))

    with serving(serve) as address, pytest.raises(WireError, match="does not know this group's secret"):
        connect(address, NOTES, b"guessed", timeout=5)
    assert "does not know this group's secret" in refusals[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b" " * 41, "does not speak podquant's protocol"),
        (b"podquant\x63" + b"\0" * 32, f"speaks version 99 of podquant's protocol, this process version {VERSION}"),
        (b"pod", "no answer in time"),
    ],
)
def test_strangers_are_refused_in_time(data: bytes, message: str) -> None:
    with serving(lambda peer: check(peer, message)) as address, socket.create_connection(address, 5) as stranger:
        stranger.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass


def test_a_stranger_who_trickles_has_no_longer_than_one_who_is_silent() -> None:
    with serving(lambda peer: check(peer, "no answer in time")) as address:
        stranger = socket.create_connection(address, 5)
        with contextlib.suppress(OSError), stranger:
            while True:  # until the other end has closed the connection
                stranger.sendall(b"p")
                time.sleep(0.05)


def test_a_caller_gets_no_proof_before_its_own() -> None:
    refused = serving(lambda peer: check(peer, "does not know this group's secret"))
    with refused as address, socket.create_connection(address, 5) as stranger:
        stranger.sendall(b"podquant" + bytes([VERSION]) + bytes(32) + bytes(32))
        answer = b"".join(iter(lambda: _receive(stranger), b""))
    assert len(answer) == len(b"podquant") + 1 + 32


def _receive(peer: socket.socket) -> bytes:
    try:
        return peer.recv(4096)
    except ConnectionResetError:
        return b""


def test_a_handshake_that_was_recorded_is_of_no_use() -> None:
    recorded: list[bytes] = []

    def keep(data: bytes) -> bytes:
        recorded.append(data)
        return data

    with tapped(lambda data: data, keep) as (client, server):
        client.send(Note(1))
        server.receive(timeout=5)
    refused = serving(lambda peer: check(peer, "does not know this group's secret"))
    with refused as address, socket.create_connection(address, 5) as stranger:
        stranger.sendall(b"".join(recorded))
        while _receive(stranger):
            pass


@pytest.fixture
def reception() -> Iterator[tuple[tuple[str, int], list[Connection[Note]], list[str]]]:
    """Where to call, who was welcomed, and why others were not."""
    listener = PeerListener("127.0.0.1", 0)
    came: list[Connection[Note]] = []
    refused: list[str] = []
    taking = Reception(listener, NOTES, SECRET, came.append, lambda error: refused.append(str(error)))
    is_over = threading.Event()

    def run() -> None:
        while not is_over.is_set():
            taking.take_in(timeout=0.1)

    thread = threading.Thread(target=run)
    thread.start()
    yield ("127.0.0.1", listener.port), came, refused
    is_over.set()
    thread.join()
    listener.close()
    for connection in came:
        connection.close()


def test_any_number_of_silent_strangers_keep_nobody_out(
    reception: tuple[tuple[str, int], list[Connection[Note]], list[str]],
) -> None:
    address, came, refused = reception
    with contextlib.ExitStack() as strangers:
        for _ in range(100):
            strangers.enter_context(socket.create_connection(address, 5))
        with connect(address, NOTES, SECRET, timeout=5) as client:
            client.send(Note(1))
            wait_until(lambda: bool(came), 5, "the caller who knows the secret is in")
            assert came[0].receive(timeout=5) == Note(1)
        wait_until(lambda: len(refused) >= 100 - 64, 5, "the first are ended for the last")
        assert sum(thread.name == "caller" for thread in threading.enumerate()) < 80


def check(peer: socket.socket, message: str) -> None:
    with pytest.raises(WireError, match=message):
        Connection(peer, NOTES, SECRET, is_server=True, timeout=0.3)


@contextmanager
def tapped(change: Callable[[bytes], bytes], greet: Callable[[bytes], bytes] = lambda data: data) -> Iterator[Pair]:
    """Two ends with someone between them who passes on what `change` makes of each message of the client's, and `greet`
    of its part of the handshake."""
    ours, theirs = socket.socketpair()
    left, right = socket.socketpair()

    def pass_on(source: socket.socket, target: socket.socket, alter: Callable[[bytes], bytes]) -> None:
        handshake = 41 + 32  # a greeting and a proof
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                first, data = data[:handshake], data[handshake:]
                handshake -= len(first)
                if source is theirs and first:
                    first = greet(first)
                target.sendall(first + (alter(data) if data else b""))
        target.close()

    threads = [
        threading.Thread(target=pass_on, args=(theirs, left, change), daemon=True),
        threading.Thread(target=pass_on, args=(left, theirs, lambda data: data), daemon=True),
    ]
    for thread in threads:
        thread.start()
    ends: list[Connection[Note]] = []
    server = threading.Thread(target=lambda: ends.append(Connection(right, NOTES, SECRET, is_server=True)))
    server.start()
    with Connection(ours, NOTES, SECRET) as client:
        server.join()
        with ends[0]:
            yield client, ends[0]
    for thread in threads:
        thread.join(10)


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data.replace(b'"number":1', b'"number":2')],
)
def test_a_message_that_was_changed_is_refused(change: Callable[[bytes], bytes]) -> None:
    with tapped(change) as (client, server):
        client.send(Note(1))
        with pytest.raises(WireError, match="changed in transit"):
            server.receive(timeout=5)


def test_a_message_that_is_repeated_is_refused() -> None:
    with tapped(lambda data: data + data) as (client, server):
        client.send(Note(1))
        assert server.receive(timeout=5) == Note(1)
        with pytest.raises(WireError, match="changed in transit"):
            server.receive(timeout=5)


def test_a_length_that_is_too_large_is_not_waited_for() -> None:
    with tapped(lambda data: struct.pack(">I", wire.MAX_BYTES + 1) + data[4:]) as (client, server):
        client.send(Note(0))
        with pytest.raises(WireError, match="announced a message of 67,108,865 bytes"):
            server.receive(timeout=5)


@pytest.mark.parametrize("secret", [SECRET, None])
@pytest.mark.parametrize("is_server", [True, False])
def test_another_version_is_refused_by_either_end(secret: bytes | None, is_server: bool) -> None:
    """Each names both versions: this end hears of theirs, and has told its own."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(b"podquant\x4d" + (b"" if secret is None else bytes(32)))
        expected = f"speaks version 77 of podquant's protocol, this process version {VERSION}: install the same"
        with pytest.raises(VersionError, match=expected):
            Connection(ours, NOTES, secret, is_server=is_server)
        assert theirs.recv(100).startswith(b"podquant" + bytes([VERSION]))
        assert theirs.recv(100) == b""


def test_silence_and_an_end_are_told(pair: Pair) -> None:
    client, server = pair
    with pytest.raises(WireError, match="no answer in time"):
        server.receive(timeout=0.1)
    with pytest.raises(WireError, match="closed the connection"):
        client.receive(timeout=5)
    with pytest.raises(WireError, match="cannot send"):
        client.send(Note(1, "to nobody"))


def test_a_port_that_is_taken_is_named() -> None:
    listener = PeerListener("127.0.0.1", 0)
    with pytest.raises(ClusterError, match=rf"127.0.0.1:{listener.port}: cannot listen there.*in use"):
        PeerListener("127.0.0.1", listener.port)
    listener.close()
    with pytest.raises(WireError, match="cannot connect"):
        connect(("127.0.0.1", listener.port), NOTES, SECRET, timeout=1)
