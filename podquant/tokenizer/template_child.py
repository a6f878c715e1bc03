"""What runs in the process of a `TemplateProcess`: one message in, one out, on the socket that is its stdin.

The first says the template and the limits, each further one a chat. Knows nothing of checkpoints.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import queue
import resource
import socket
import sys
import threading
import time

from podquant.errors import RequestError
from podquant.tokenizer.chat_template import ChatTemplate
from podquant.tokenizer.frames import receive, send

ASKED, RENDERED, REFUSED = range(3)
"""Kinds of messages: what the process is told, and what it answers, the text or why there is none."""

_FILES = 16
"""Modules that Jinja and strftime import at their first use are read."""


def main() -> None:
    """Serve until the socket closes."""
    connection = socket.socket(fileno=0)
    asked: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, asked), daemon=True).start()
    declared = marshal.loads(asked.get())
    _confine(declared["memory_bytes"])
    template = ChatTemplate(declared["source"], declared["variables"], declared["where"])
    send(connection, RENDERED, b"")
    while True:
        _allow_seconds(declared["seconds"])
        ask = marshal.loads(asked.get())
        try:
            text = template.render(**ask, most=declared["characters"])
            send(connection, RENDERED, text.encode())
        except RequestError as error:
            send(connection, REFUSED, str(error).encode(errors="replace"))
        except UnicodeEncodeError:
            refusal = f"The model's chat template ({template.where}) writes half a surrogate pair; fix the template."
            send(connection, REFUSED, refusal.encode())


def _read(connection: socket.socket, asked: queue.SimpleQueue[bytearray]) -> None:
    """In a thread: whatever a template is at, the process ends with the one that started it."""
    with contextlib.suppress(OSError):
        while True:
            asked.put(receive(connection, sys.maxsize)[1])
    os._exit(0)


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
