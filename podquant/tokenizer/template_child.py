"""What runs in the process of a `TemplateProcess`: one line of JSON in, one out, on the socket that is its stdin.

The first line says the template and the limits, each further one a chat. Knows nothing of checkpoints.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import socket
import threading
import time
from typing import Any

from podquant.errors import RequestError
from podquant.tokenizer.chat_template import ChatTemplate

_FILES = 16
"""Modules that Jinja and strftime import at their first use are read."""


def main() -> None:
    """Serve until the socket closes."""
    connection = socket.socket(fileno=0)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, lines), daemon=True).start()
    declared = json.loads(lines.get())
    _confine(declared["memory_bytes"])
    template = ChatTemplate(declared["source"], declared["variables"], declared["where"])
    _answer(connection, {})
    while True:
        _allow_seconds(declared["seconds"])
        ask = json.loads(lines.get())
        try:
            _answer(connection, {"text": template.render(**ask, most=declared["characters"])})
        except RequestError as error:
            _answer(connection, {"refused": str(error)})


def _read(connection: socket.socket, lines: queue.SimpleQueue[bytes]) -> None:
    """In a thread: whatever a template is at, the process ends with the one that started it."""
    with connection.makefile("rb") as file:
        for line in file:
            lines.put(line)
    os._exit(0)


def _answer(connection: socket.socket, answer: dict[str, Any]) -> None:
    connection.sendall(json.dumps(answer).encode() + b"\n")


def _confine(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))


def _allow_seconds(seconds: float) -> None:
    """Let the kernel end what a template does without ever returning to Python."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, hard))


if __name__ == "__main__":
    main()
