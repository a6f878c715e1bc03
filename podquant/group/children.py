"""The processes of groups on one host: started, listened to, watched and ended, by a parent that never touches a chip.

A process that ends, or gives no sign of life, or is at one step for too long, is ended for good and said to have ended.
No process outlives its parent, however that ends. Knows nothing of other hosts or of what the processes say.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from podquant.group.launch import Launch, Place
from podquant.group.wire import Connection, WireError

_IMPORT_SECONDS = 120.0
"""A process on a busy host may take so long until it says its first word."""


@dataclass(frozen=True)
class Word:
    """What a process said, or that it has ended (`body["is"] == "ended"`, with a reason)."""

    place: Place
    generation: int
    body: Mapping[str, Any]


Tell = Callable[[Word], None]
"""Called from threads."""


class Children:
    """The processes on this host, one a group; each launch is of a new one."""

    def __init__(self, secret: bytes, tell: Tell) -> None:
        """`secret` is the group's; `tell` hears all words, one process's in order."""
        self._secret, self._tell = secret, tell
        self._lock = threading.Lock()
        self._children: dict[int, _Child] = {}

    def launch(self, launch: Launch) -> None:
        """Start a process, in a thread that lives as long as it may: it ends with the thread that started it."""
        self.end(launch.place.group)
        child = _Child(launch, self._secret, self._tell)
        with self._lock:
            self._children[launch.place.group] = child
        child.start()

    def command(self, group: int, generation: int, body: Mapping[str, Any]) -> None:
        """Tell a process something; one that is not there any more has said so, or will."""
        with self._lock:
            child = self._children.get(group)
        if child is not None and child.launch.generation == generation:
            child.send(body)

    def end(self, group: int) -> None:
        """End a group's process at once, and wait until it is gone."""
        with self._lock:
            child = self._children.pop(group, None)
        if child is not None:
            child.end("it was told to")

    def end_all(self) -> None:
        """End them all."""
        with self._lock:
            groups = list(self._children)
        for group in groups:
            self.end(group)

    @property
    def pids(self) -> list[int]:
        """The processes there are."""
        with self._lock:
            return [child.pid for child in self._children.values()]


class _Child:
    """One process, from start to end."""

    def __init__(self, launch: Launch, secret: bytes, tell: Tell) -> None:
        self.launch = launch
        self._tell = tell
        self._deadlines = launch.deadlines
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._is_over = threading.Event()
        ours, theirs = socket.socketpair()
        self._secret = secret
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "podquant.group.member", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,
                env=os.environ | _chips(launch),
                text=True,
            )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:  # not in its arguments or environment, which others can see
            stdin.write(secret.hex() + "\n")
        self._socket = ours
        self._connection: Connection | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        threading.Thread(target=self._listen, name=f"child-{self.pid}", daemon=True).start()

    def send(self, body: Mapping[str, Any]) -> None:
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(WireError):  # who listens finds it too
                connection.send(body, timeout=self._deadlines.liveness)

    def end(self, reason: str) -> None:
        """SIGKILL, which also ends what is stopped or stuck; the first reason is the one told."""
        with self._lock:
            self._reason = self._reason or reason
        self._process.kill()
        self._process.wait()
        self._is_over.wait(self._deadlines.liveness)

    def _listen(self) -> None:
        try:
            self._connection = Connection(self._socket, self._secret, is_server=True, timeout=_IMPORT_SECONDS)
            self._connection.send(self.launch.encode())
            threading.Thread(target=self._beat, name=f"beat-{self.pid}", daemon=True).start()
            while True:
                body = self._connection.receive(timeout=self._deadlines.liveness).body
                if body["is"] == "beat" and body["busy"] > self._deadlines.step:
                    raise WireError(f"busy: has been at one step for {body['busy']:.0f} s")
                self._tell(Word(self.launch.place, self.launch.generation, body))
        except WireError as error:
            reason = str(error).partition(": ")[2]
        self._end_process(reason)

    def _end_process(self, reason: str) -> None:
        """See the process gone, and tell."""
        try:  # a connection that closed is most often a process that is just ending by itself
            status = self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            status = None
        with self._lock:
            if self._reason is None:
                self._reason = reason if status is None else _describe(status)
        self._socket.close()
        self._is_over.set()
        body = {"is": "ended", "reason": f"process {self.pid}: {self._reason}"}
        self._tell(Word(self.launch.place, self.launch.generation, body))

    def _beat(self) -> None:
        while not self._is_over.wait(self._deadlines.beat):
            self.send({"do": "beat"})


def _describe(status: int) -> str:
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
"""How so many chips of a host are wired, as libtpu wants it said."""


def _chips(launch: Launch) -> dict[str, str]:
    """Variables by which libtpu takes its share of a host's chips, where groups share it; empty for all chips.

    As in Cloud TPU's documentation of several processes on one host; a process then sees its own chips only.
    """
    place, count = launch.place, launch.options.tp_size
    if place.num_on_host == 1 or launch.options.device != "tpu":
        return {}
    first = place.on_host * count
    return {
        "TPU_VISIBLE_CHIPS": ",".join(str(chip) for chip in range(first, first + count)),
        "TPU_CHIPS_PER_PROCESS_BOUNDS": _BOUNDS.get(count, f"1,{count},1"),
        "TPU_PROCESS_BOUNDS": "1,1,1",
    }
