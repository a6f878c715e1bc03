"""The members of groups on one host: started, listened to, watched and ended, by a parent that never touches a chip.

A process that ends, or sends no heartbeat, or is at one step for too long, is killed, and reported to have ended. No
process outlives its parent, however that ends. Knows nothing of other hosts or of what is done in the processes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from podquant.group.launch import Launch, step_key
from podquant.group.messages import (
    FROM_MEMBER,
    Ended,
    EngineCommand,
    FromMember,
    Heartbeat,
    MemberHeartbeat,
    Report,
    Start,
    ToMember,
)
from podquant.group.wire import Connection, WireError

_log = logging.getLogger(__name__)

_IMPORT_SECONDS = 120.0
"""A process on a busy host may take so long until it says hello."""

OnReport = Callable[[Report], None]
"""Called from threads."""


class Children:
    """The processes on this host, one a group; each launch is of a new one."""

    def __init__(self, secret: bytes, on_report: OnReport) -> None:
        """`secret` is the group's; `on_report` hears of all processes, of each one in order."""
        self._secret, self._on_report = secret, on_report
        self._lock = threading.Lock()
        self._children: dict[int, _Child] = {}

    def launch(self, launch: Launch) -> None:
        """Start a process, in a thread that lives as long as it may: it ends with the thread that started it.

        One that cannot be started, for want of memory, file descriptors or threads, is reported to have ended.
        """
        self.end(launch.member.group)
        try:
            child = _Child(launch, step_key(self._secret, launch.nonce), self._on_report)
        except OSError as error:
            self._on_report(Report(launch.member, launch.generation, Ended(f"cannot be started: {error}")))
            return
        with self._lock:
            self._children[launch.member.group] = child
        child.start()

    def command(self, group: int, generation: int, command: EngineCommand) -> None:
        """Tell a process something; one that is not there any more has said so, or will."""
        with self._lock:
            child = self._children.get(group)
        if child is not None and child.launch.generation == generation:
            child.send(command)

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
    """One process, from start to end. Only it and this process have the two sockets on which they talk."""

    def __init__(self, launch: Launch, key: bytes, on_report: OnReport) -> None:
        self.launch, self._key = launch, key
        self._on_report = on_report
        self._deadlines = launch.deadlines
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._is_over = threading.Event()
        self._socket, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(self._socket.close)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "podquant.group.member", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | _chips(launch),
            )
            undo.pop_all()
        self._connection: Connection[FromMember] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        try:
            threading.Thread(target=self._listen, name=f"child-{self.pid}", daemon=True).start()
        except RuntimeError as error:
            self._end_process(str(error))

    def send(self, message: ToMember) -> None:
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(WireError):  # who listens finds it too
                connection.send(message, timeout=self._deadlines.liveness)

    def end(self, reason: str) -> None:
        """SIGKILL, which also ends what is stopped or stuck; the first reason is the one told."""
        with self._lock:
            self._reason = self._reason or reason
        self._process.kill()
        self._process.wait()
        self._is_over.wait(self._deadlines.liveness)

    def _listen(self) -> None:
        try:
            self._connection = Connection(self._socket, FROM_MEMBER, None, timeout=_IMPORT_SECONDS)
            self._connection.send(Start(self.launch, self._key.hex()))
            threading.Thread(target=self._send_heartbeats, name=f"heartbeat-{self.pid}", daemon=True).start()
            while True:
                message = self._connection.receive(timeout=self._deadlines.liveness)
                if isinstance(message, MemberHeartbeat) and message.busy_seconds > self._deadlines.step:
                    raise WireError(f"busy: has been at one step for {message.busy_seconds:.0f} s")
                self._report(message)
        except WireError as error:
            reason = str(error).partition(": ")[2]
        except Exception as error:
            _log.exception("process %d", self.pid)
            reason = f"{type(error).__name__}: {error}"
        self._end_process(reason)

    def _end_process(self, reason: str) -> None:
        """See the process gone, and report it."""
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
        self._report(Ended(f"process {self.pid}: {self._reason}"))

    def _report(self, message: FromMember) -> None:
        self._on_report(Report(self.launch.member, self.launch.generation, message))

    def _send_heartbeats(self) -> None:
        while not self._is_over.wait(self._deadlines.heartbeat):
            self.send(Heartbeat())


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
    member, count = launch.member, launch.options.tp_size
    if member.num_on_host == 1 or launch.options.device != "tpu":
        return {}
    first = member.index_on_host * count
    return {
        "TPU_VISIBLE_CHIPS": ",".join(str(chip) for chip in range(first, first + count)),
        "TPU_CHIPS_PER_PROCESS_BOUNDS": _BOUNDS.get(count, f"1,{count},1"),
        "TPU_PROCESS_BOUNDS": "1,1,1",
    }
