"""The hosts of a service, as host 0 sees them: itself, and others that call it over an authenticated connection.

A host says who it is and how it was started, then starts, relays to and ends processes as it is told; either side takes
the other for dead after a silence. Knows nothing of what is done in the processes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from podquant.engine.options import EngineOptions
from podquant.group.children import Children, OnReport
from podquant.group.launch import OWN_OPTIONS, Deadlines, Launch, Member
from podquant.group.messages import (
    FROM_HOST,
    CommandMember,
    Ended,
    EndMember,
    EngineCommand,
    Flag,
    FromHost,
    Heartbeat,
    HostHello,
    Refusal,
    Report,
    Shutdown,
    StartMember,
    ToHost,
    Welcome,
)
from podquant.group.wire import Connection, PeerListener, Reception, VersionError, WireError

_log = logging.getLogger(__name__)


class Host(Protocol):
    """A host that runs processes of groups."""

    @property
    def absence(self) -> str | None:
        """Why it cannot be used, with its name and since when; None if it can."""

    @property
    def address(self) -> str:
        """Where its processes are reached by those of other hosts."""

    def launch(self, launch: Launch) -> None:
        """Start a process; all that becomes of it is reported."""

    def command(self, group: int, generation: int, command: EngineCommand) -> None:
        """Tell a process something."""

    def end(self, group: int) -> None:
        """End a group's process."""


class LocalHost:
    """This host; a `Host`."""

    absence = None

    def __init__(self, address: str, children: Children) -> None:
        self.address = address
        self._children = children

    def launch(self, launch: Launch) -> None:
        self._children.launch(launch)

    def command(self, group: int, generation: int, command: EngineCommand) -> None:
        self._children.command(group, generation, command)

    def end(self, group: int) -> None:
        self._children.end(group)


class RemoteHost:
    """A host that calls this one, or is yet to; a `Host`."""

    def __init__(self, number: int, on_report: OnReport, deadlines: Deadlines) -> None:
        self._number, self._on_report, self._deadlines = number, on_report, deadlines
        self._lock = threading.Lock()
        self._connection: Connection[FromHost] | None = None
        self._absence: str | None = f"host {number} has not come yet"
        self._refusal = ""
        self._running: dict[int, tuple[Member, int]] = {}
        self._turn = threading.Lock()
        """Of one caller at a time to become the host."""
        self._heard = 0.0
        self.address = ""

    @property
    def absence(self) -> str | None:
        absence = self._absence
        return absence if absence is None else absence + self._refusal

    def launch(self, launch: Launch) -> None:
        with self._lock:
            absence = self._absence
            if absence is None:
                self._running[launch.member.group] = launch.member, launch.generation
        if absence is None:
            self._send(StartMember(launch))
        else:  # lost since it was looked for
            self._on_report(Report(launch.member, launch.generation, Ended(absence)))

    def command(self, group: int, generation: int, command: EngineCommand) -> None:
        self._send(CommandMember(group, generation, command))

    def end(self, group: int) -> None:
        self._send(EndMember(group))

    def stop(self) -> None:
        """Let it go: it ends its processes and itself."""
        self._send(Shutdown())

    def note_refusal(self, reason: str) -> None:
        """A caller was refused who may have been this host: for whoever asks why it is absent."""
        self._refusal = f" (refused at {time.strftime('%H:%M:%S')}: {reason})"

    def attach(self, connection: Connection[FromHost]) -> bool:
        """Use this connection from now on; False if another one is in use, and lives. Blocks until it ends."""
        with self._turn:
            if not self._make_room():
                return False
            connection.send(Welcome())
            with self._lock:
                self._connection, self._absence, self._refusal = connection, None, ""
                self._heard = time.monotonic()
                self.address = connection.address.rpartition(":")[0]
        _log.info("host %d has come, from %s", self._number, connection.address)
        reason = "failed"
        try:
            threading.Thread(target=self._send_heartbeats, args=(connection,), name="heartbeat", daemon=True).start()
            while True:
                message = connection.receive(timeout=self._deadlines.liveness)
                self._heard = time.monotonic()
                if isinstance(message, Report):
                    self._take(message)
                elif not isinstance(message, Heartbeat):
                    raise connection.unexpected(message)
        except WireError as error:
            reason = str(error)
        finally:
            connection.close()
            self._detach(reason)
        return True

    def _make_room(self) -> bool:
        """End a connection that has been silent for longer than a heartbeat: its host has called again, since it was
        cut off before this end could notice. False if it is heard of meanwhile."""
        came, patience = time.monotonic(), 1.5 * self._deadlines.heartbeat
        while (old := self._connection) is not None:
            if self._heard > came + 0.5 * self._deadlines.heartbeat:
                return False
            if time.monotonic() - self._heard > patience:
                old.close()  # whoever receives there lets it go
            time.sleep(0.02)
        return True

    def _take(self, report: Report) -> None:
        if isinstance(report.message, Ended):
            group = report.member.group
            with self._lock:
                if self._running.get(group) == (report.member, report.generation):
                    del self._running[group]
        self._on_report(report)

    def _detach(self, reason: str) -> None:
        since = time.strftime("%H:%M:%S")
        with self._lock:
            self._connection = None
            self._absence = f"host {self._number} is lost since {since} ({reason})"
            lost, self._running = self._running, {}
        _log.warning("%s", self._absence)
        for member, generation in lost.values():
            self._on_report(Report(member, generation, Ended(f"was on host {self._number}: {reason}")))

    def _send(self, message: ToHost) -> None:
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(WireError):  # whoever receives there finds it too, and reports it
                connection.send(message)

    def _send_heartbeats(self, connection: Connection[FromHost]) -> None:
        while self._connection is connection:
            self._send(Heartbeat())
            time.sleep(self._deadlines.heartbeat)


@dataclass(frozen=True)
class SharedFlags:
    """What all hosts must be started with alike."""

    num_hosts: int
    num_groups: int
    options: EngineOptions

    def describe(self) -> dict[str, Flag]:
        """By flag, without what is each host's own."""
        options = {name: value for name, value in asdict(self.options).items() if name not in OWN_OPTIONS}
        return {"nnodes": self.num_hosts, "dp_size": self.num_groups, **options}


class HostAcceptor:
    """Takes in the other hosts, on host 0, for as long as it is open."""

    def __init__(
        self, listener: PeerListener, secret: bytes, flags: SharedFlags, hosts: Mapping[int, RemoteHost]
    ) -> None:
        self._listener, self._hosts = listener, hosts
        self._reception = Reception(listener, FROM_HOST, secret, self._welcome, self._note)
        self._expected = flags.describe()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="acceptor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take in no more hosts."""
        self._is_open = False
        self._listener.close()
        self._thread.join()

    def _run(self) -> None:
        while self._is_open:
            self._reception.take_in(timeout=0.5)

    def _welcome(self, connection: Connection[FromHost]) -> None:
        hello = connection.receive(timeout=10.0)
        if not isinstance(hello, HostHello):
            raise connection.unexpected(hello)
        host, refusal = self._hosts.get(hello.host), self._refusal(hello)
        if host is None or refusal:
            if host is not None:
                host.note_refusal(refusal)
            _refuse(connection, refusal, is_final=True)
            return
        if not host.attach(connection):
            _refuse(connection, f"there is a host {hello.host} already, and it answers", is_final=False)

    def _note(self, error: WireError) -> None:
        if isinstance(error, VersionError):
            for host in self._hosts.values():  # one of those that are absent; nobody knows which
                host.note_refusal(str(error))
        _log.warning("refused: %s", error)

    def _refusal(self, hello: HostHello) -> str:
        """Why a host cannot be taken in; empty if it can."""
        if hello.host not in self._hosts:
            return f"--node-rank must be {_either(sorted(self._hosts))}, got {hello.host}"
        theirs = hello.flags
        different = [
            f"--{name.replace('_', '-')} is {_given(theirs, name)} there and {_given(self._expected, name)} on host 0"
            for name in {**self._expected, **theirs}
            if theirs.get(name) != self._expected.get(name)
        ]
        if not different:
            return ""
        return f"host {hello.host} was started with other flags than host 0: {'; '.join(different)}"


def _refuse(connection: Connection[FromHost], reason: str, *, is_final: bool) -> None:
    _log.warning("refused %s: %s", connection.address, reason)
    connection.send(Refusal(reason, is_final))
    connection.close()


def _either(numbers: Sequence[int]) -> str:
    """`1`, `1 or 2`, `1, 2 or 3`."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def _given(flags: Mapping[str, Flag], name: str) -> str:
    value = flags.get(name)
    return "not given" if value is None else repr(value)
