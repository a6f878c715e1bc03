"""Strangers on real sockets, who say nothing, or half of something, or do not listen; the deadlines are short here."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from podquant.engine.engine import LocalEngine
from podquant.server.connections import ConnectionLimits
from tests.server.conftest import serving

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
PATIENCE = 60.0
"""Seconds in which what is waited for comes to pass on however busy a machine."""


def connect(url: str) -> socket.socket:
    """A connection that waits long, for what is to come or for the end."""
    parts = urlsplit(url)
    connection = socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=PATIENCE)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What the server says until it closes."""
    try:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))
    except ConnectionResetError:
        return b""


def error_of(answer: bytes) -> tuple[int, str]:
    """Status and code."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.fixture(scope="module")
def hasty(engine: LocalEngine) -> Iterator[str]:
    """A server that waits half a second."""
    with serving(engine, limits=ConnectionLimits(head_seconds=0.5), body_seconds=0.5) as url:
        yield url


def test_who_says_nothing_is_hung_up_on(hasty: str) -> None:
    with closing(connect(hasty)) as connection:
        assert read_all(connection) == b""


@pytest.mark.parametrize("sent", [b"G", b"GET /health HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Le"])
def test_half_a_head_is_told_so(hasty: str, sent: bytes) -> None:
    with closing(connect(hasty)) as connection:
        connection.sendall(sent)
        assert error_of(read_all(connection)) == (408, "request_timeout")


def trickle(connection: socket.socket, piece: bytes) -> bytes:
    """Send a piece again and again until the server has had enough; what it says."""
    connection.settimeout(0.05)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            connection.sendall(piece)
            answer = connection.recv(1 << 16)
        except TimeoutError:
            continue
        except ConnectionError:
            return b""
        connection.settimeout(PATIENCE)
        return answer + read_all(connection)
    raise AssertionError("the server still waits")


def test_a_head_that_trickles_has_one_deadline(hasty: str) -> None:
    with closing(connect(hasty)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert error_of(trickle(connection, b"X-A: b\r\n")) == (408, "request_timeout")


def test_so_has_the_head_of_a_further_request(hasty: str) -> None:
    with closing(connect(hasty)) as connection:
        connection.sendall(HEALTH + b"GET /hea")
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"408 Request Timeout" in answer


@pytest.mark.parametrize("head", [b"Content-Length: 1000000", b"Transfer-Encoding: chunked"])
def test_a_body_that_trickles_is_refused(hasty: str, head: bytes) -> None:
    with closing(connect(hasty)) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head + b"\r\n\r\n")
        answer = trickle(connection, b"1\r\n1\r\n" if b"chunked" in head else b"1")
        assert error_of(answer)[1] == "request_timeout"


def test_a_head_has_a_bound(hasty: str) -> None:
    with closing(connect(hasty)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        trickle(connection, b"X-A: " + b"b" * 8192 + b"\r\n")  # it ends; the answer may be lost under what was sent


@pytest.mark.parametrize(("size", "status"), [(1, b"400"), (8, b"400"), (64, b"413")])
def test_a_body_of_tiny_chunks_is_refused(engine: LocalEngine, size: int, status: bytes) -> None:
    with serving(engine, max_body_bytes=1 << 18) as url, closing(connect(url)) as connection:
        chunk = b"%x\r\n" % size + b" " * size + b"\r\n"
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nConnection: close\r\n")
        connection.sendall(b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r")
        connection.sendall(b"\n" + chunk * ((1 << 18) // size + 1) + b"0\r\n\r\n")
        answer = read_all(connection)
        assert answer.split()[1] == status
        assert (b"small_chunks" in answer) == (status == b"400")


def test_so_is_one_that_came_before_its_turn(hasty: str) -> None:
    with closing(connect(hasty)) as connection:
        head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(HEALTH + head + b"1\r\na\r\n" * 20_000 + b"0\r\n\r\n")
        first, _, second = read_all(connection).partition(b"HTTP/1.1 400")
        assert first.startswith(b"HTTP/1.1 200")
        assert b"small_chunks" in second


def test_an_idle_connection_stays_longer(hasty: str) -> None:
    with closing(connect(hasty)) as connection:
        for _ in range(2):
            connection.sendall(HEALTH)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
            time.sleep(1.0)


def test_strangers_who_say_nothing_do_not_keep_others_out(engine: LocalEngine) -> None:
    limits = ConnectionLimits(most=20, most_silent=10, head_seconds=PATIENCE)
    with serving(engine, limits=limits) as url, ExitStack() as stack:
        silent = [stack.enter_context(closing(connect(url))) for _ in range(60)]
        assert httpx.get(f"{url}/health").status_code == 200
        assert read_all(silent[0]) == b""  # the first of them made room


def test_idle_connections_make_room_and_busy_ones_do_not(engine: LocalEngine) -> None:
    with serving(engine, limits=ConnectionLimits(most=3, head_seconds=PATIENCE)) as url, ExitStack() as stack:
        connections = [stack.enter_context(closing(connect(url))) for _ in range(3)]
        body = b'{"prompt":"'
        for connection in connections[:2]:
            connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            connection.sendall(b"Content-Length: %d\r\n\r\n" % (len(body) + 2) + body)
        connections[2].sendall(HEALTH)
        assert connections[2].recv(1 << 16).startswith(b"HTTP/1.1 200")
        fourth = stack.enter_context(closing(connect(url)))
        assert read_all(connections[2]) == b""
        fourth.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
        answer = b""
        while not answer:  # until the server has seen that the fourth has a request too
            fifth = stack.enter_context(closing(connect(url)))
            answer = read_all(fifth)
        assert error_of(answer) == (503, "too_many_connections")
        assert b"Retry-After: 1" in answer
        connections[0].sendall(b'a"}'[:2])
        assert connections[0].recv(1 << 16).startswith(b"HTTP/1.1 ")


def test_who_does_not_read_is_hung_up_on(engine: LocalEngine) -> None:
    with serving(engine, limits=ConnectionLimits(stuck_seconds=0.5)) as url, closing(connect(url)) as connection:
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 10_000)  # answers beyond any buffer
        deadline = time.monotonic() + PATIENCE
        while is_open(connection):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def is_open(connection: socket.socket) -> bool:
    """Whether the other side has not hung up yet."""
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


SCARCE = """
import os, resource, sys
sys.modules["uvloop"] = None  # which closes what it cannot accept
from podquant.server.app import create_app
from podquant.server.http_server import HttpServer
server = HttpServer(create_app(None), "127.0.0.1", 0)
server.start()
print(server.url, flush=True)
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
sys.stdin.readline()
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
print("scarce", flush=True)
sys.stdin.readline()
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
sys.stdin.readline()
"""


@pytest.mark.slow
def test_without_file_descriptors_it_waits_for_some_and_does_not_spin(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-c", SCARCE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        url = child.stdout.readline().decode().strip()
        assert httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 503
        child.stdin.write(b"\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"scarce\n"
        with closing(connect(url)) as waiting:
            waiting.sendall(HEALTH)
            time.sleep(1.5)
            child.stdin.write(b"\n")
            child.stdin.flush()
            assert waiting.recv(1 << 16).startswith(b"HTTP/1.1 503")
        child.stdin.close()
    assert 0 < log.read_text().count("out of system resource") < 100


def test_connections_leave_files_for_others() -> None:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert files // 2 <= ConnectionLimits().number() < files
    assert ConnectionLimits(most=7).number() == 7
