"""Bodies that are too long, by a client that sends all of one before it reads; and keys."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from podquant.engine.engine import LocalEngine
from podquant.server import chat, completions, info
from podquant.server.app import create_app
from tests.server.conftest import serving

LIMIT = 1 << 16


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with serving(None, max_body_bytes=LIMIT, api_key="secret") as url:
        parts = urlsplit(url)
        yield str(parts.hostname), int(parts.port or 0)


def talk(address: tuple[str, int], head: str, *pieces: bytes) -> tuple[int, dict[str, str]]:
    """Send everything, then read: the status and the error."""
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(f"POST {head}\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        for piece in pieces:
            connection.sendall(piece)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    first, _, rest = answer.partition(b"\r\n")
    body = rest.partition(b"\r\n\r\n")[2]
    return int(first.split()[1]), json.loads(body)["error"]


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


KEY = "\r\nAuthorization: Bearer secret"
ROUTE = "/v1/completions HTTP/1.1\r\nContent-Type: application/json"
PIECE = b" " * LIMIT
SENT = 256
"""Pieces: more than sockets' buffers hold, so that a server that does not read on breaks the pipe."""


@pytest.mark.parametrize(
    ("head", "pieces", "status"),
    [
        (f"{ROUTE}{KEY}\r\nContent-Length: {SENT * LIMIT}", [PIECE] * SENT, 413),
        (f"{ROUTE}{KEY}\r\nTransfer-Encoding: chunked", [*[chunk(PIECE)] * SENT, chunk(b"")], 413),
        (f"{ROUTE}\r\nContent-Length: {SENT * LIMIT}", [PIECE] * SENT, 401),
        (f"{ROUTE}\r\nTransfer-Encoding: chunked", [*[chunk(PIECE)] * SENT, chunk(b"")], 401),
    ],
)
def test_who_sends_on_gets_to_read_the_refusal(
    address: tuple[str, int], head: str, pieces: list[bytes], status: int
) -> None:
    got, error = talk(address, head, *pieces)
    assert got == status
    assert error["code"] == {413: "request_too_large", 401: "invalid_api_key"}[status]


def test_a_body_in_chunks_is_taken_up_to_the_limit(address: tuple[str, int]) -> None:
    body = b'{"prompt": "' + b"x" * (LIMIT - 14) + b'"}'
    assert len(body) == LIMIT
    head = f"{ROUTE}{KEY}\r\nTransfer-Encoding: chunked"
    assert talk(address, head, chunk(body[:100]), chunk(body[100:]), chunk(b""))[0] == 503  # there is no model
    status, error = talk(address, head, chunk(body[:100]), chunk(body[100:] + b" "), chunk(b""))
    assert (status, error["code"]) == (413, "request_too_large")


def test_who_waits_to_be_told_to_send_is_not_told_so(address: tuple[str, int]) -> None:
    head = f"{ROUTE}{KEY}\r\nExpect: 100-continue\r\nContent-Length: {SENT * LIMIT}"
    assert talk(address, head)[0] == 413


KEY_OF_MANY = "5ecre7-Key.of_this~test"
WRONG = [
    *(f"Bearer {KEY_OF_MANY[:length]}" for length in range(len(KEY_OF_MANY))),
    *(f"Bearer {KEY_OF_MANY[:place]}x{KEY_OF_MANY[place + 1 :]}" for place in range(len(KEY_OF_MANY))),
    *(
        f"Bearer {KEY_OF_MANY}{more}"
        for more in ("x", "\x00", "\xa0x", ",", ";", '"', "=", " Bearer", f" {KEY_OF_MANY}")
    ),
    *(
        f"{kind} {KEY_OF_MANY}"
        for kind in ("Basic", "Token", "Bear", "Bearers", "Digest", "X", "B", "Bearer:", "earer")
    ),
    *(f"Bearer {KEY_OF_MANY.swapcase()}", f"Bearer '{KEY_OF_MANY}'", KEY_OF_MANY, "", "Bearer", f"Bearer{KEY_OF_MANY}"),
    *(f"Bearer {'x' * 10**size}" for size in range(5)),
    *(
        f"Bearer {guess}"
        for guess in ("none", "null", "None", "undefined", "EMPTY", "secret", "sk-", "é", "漢", "%00", "*")
    ),
    *(f"Bearer {KEY_OF_MANY[::-1][:length]}" for length in range(1, 19)),
]


def test_a_hundred_wrong_keys_on_every_route_and_method(engine: LocalEngine) -> None:
    """Without a socket: some thousand requests, and headers that a client would not send."""
    assert len(set(WRONG)) >= 100
    app = create_app(engine, api_key=KEY_OF_MANY, served_model_name="of-nobody-else")
    paths = {getattr(route, "path", "/") for router in (completions, chat, info) for route in router.router.routes}
    guarded = sorted(paths - {"/health", "/ready"} | {"/openapi.json", "/docs", "/nowhere", "/v1/models/", "//health"})
    methods = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "health")
    asks = [(path, method, WRONG[0]) for path in guarded for method in methods]
    asks += [
        (path, "POST" if "okenize" in path or "completions" in path else "GET", key)
        for path in guarded
        for key in WRONG
    ]

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return [
                await client.request(method, path, headers=[(b"authorization", key.encode())], json={"prompt": [5]})
                for path, method, key in asks
            ]

    for answer in asyncio.run(ask_all()):
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        error = answer.json()["error"]
        assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_api_key", None)
        assert not any(word in answer.text for word in (KEY_OF_MANY, "of-nobody-else", "podquant", "Traceback"))
