"""The hosts of a service, as host 0 sees them: itself, and others that call it over an authenticated connection.

A host says who it is and how it was started, then starts, relays to and ends processes as it is told; either side takes
the other for dead after a silence. Knows nothing of what the processes say.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from podquant.engine.options import EngineOptions
from podquant.group.children import Children, Tell, Word
from podquant.group.launch import OWN_OPTIONS, Deadlines, Launch, Place
from podquant.group.wire import Connection, Listener, WireError

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
        """Start a process; all that becomes of it is told."""

    def command(self, group: int, generation: int, body: Mapping[str, Any]) -> None:
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

    def command(self, group: int, generation: int, body: Mapping[str, Any]) -> None:
        self._children.command(group, generation, body)

    def end(self, group: int) -> None:
        self._children.end(group)


class RemoteHost:
    """A host that calls this one, or is yet to; a `Host`."""

    def __init__(self, number: int, tell: Tell, deadlines: Deadlines) -> None:
        self._number, self._tell, self._deadlines = number, tell, deadlines
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._absence: str | None = f"host {number} has not come yet"
        self._running: dict[int, tuple[Place, int]] = {}
        self.address = ""

    @property
    def absence(self) -> str | None:
        return self._absence

    def launch(self, launch: Launch) -> None:
        with self._lock:
            self._running[launch.place.group] = launch.place, launch.generation
        self._send({"do": "launch", "launch": launch.encode()})

    def command(self, group: int, generation: int, body: Mapping[str, Any]) -> None:
        self._send({"do": "command", "group": group, "generation": generation, "body": dict(body)})

    def end(self, group: int) -> None:
        self._send({"do": "end", "group": group})

    def stop(self) -> None:
        """Let it go: it ends its processes and itself."""
        self._send({"do": "stop"})

    def attach(self, connection: Connection) -> bool:
        """Use this connection from now on; False if there is one already. Blocks until it ends."""
        with self._lock:
            if self._connection is not None:
                return False
            self._connection, self._absence = connection, None
            self.address = connection.address.rpartition(":")[0]
        _log.info("host %d has come, from %s", self._number, connection.address)
        threading.Thread(target=self._beat, args=(connection,), name="beat", daemon=True).start()
        try:
            while True:
                self._hear(connection.receive(timeout=self._deadlines.liveness).body)
        except WireError as error:
            self._detach(str(error))
        return True

    def _hear(self, body: Mapping[str, Any]) -> None:
        if body["is"] == "child":
            word = Word(Place(**body["place"]), body["generation"], body["body"])
            if word.body["is"] == "ended":
                self._forget(word)
            self._tell(word)

    def _forget(self, word: Word) -> None:
        with self._lock:
            if self._running.get(word.place.group) == (word.place, word.generation):
                del self._running[word.place.group]

    def _detach(self, reason: str) -> None:
        since = time.strftime("%H:%M:%S")
        with self._lock:
            self._connection = None
            self._absence = f"host {self._number} is lost since {since} ({reason})"
            lost, self._running = self._running, {}
        _log.warning("%s", self._absence)
        for place, generation in lost.values():
            self._tell(Word(place, generation, {"is": "ended", "reason": f"was on host {self._number}: {reason}"}))

    def _send(self, body: Mapping[str, Any]) -> None:
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(WireError):  # whoever receives there finds it too, and tells
                connection.send(body)

    def _beat(self, connection: Connection) -> None:
        while self._connection is connection:
            self._send({"do": "beat"})
            time.sleep(self._deadlines.beat)


@dataclass(frozen=True)
class Roll:
    """What all hosts must be started with alike."""

    num_hosts: int
    num_groups: int
    options: EngineOptions

    def describe(self) -> dict[str, Any]:
        """By flag, without what is each host's own."""
        options = {name: value for name, value in asdict(self.options).items() if name not in OWN_OPTIONS}
        return {"nnodes": self.num_hosts, "dp_size": self.num_groups, **options}


class Reception:
    """Takes in the other hosts, on host 0, for as long as it is open."""

    def __init__(self, listener: Listener, secret: bytes, roll: Roll, hosts: Mapping[int, RemoteHost]) -> None:
        self._listener, self._secret, self._hosts = listener, secret, hosts
        self._expected = roll.describe()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="reception", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take in no more hosts."""
        self._is_open = False
        self._listener.close()
        self._thread.join()

    def _run(self) -> None:
        while self._is_open:
            peer = self._listener.accept(timeout=0.5)
            if peer is not None:
                threading.Thread(target=self._welcome, args=(peer,), name="host", daemon=True).start()

    def _welcome(self, peer: Any) -> None:
        try:
            connection = Connection(peer, self._secret, is_server=True)
            hello = connection.receive(timeout=10.0).body
            number, started = hello.get("host"), hello.get("started") or {}
            unlike = [
                f"--{name.replace('_', '-')} is {started.get(name)!r} there and {value!r} on host 0"
                for name, value in self._expected.items()
                if started.get(name) != value
            ]
            host = self._hosts.get(number) if isinstance(number, int) else None
            if host is None:
                unlike = [f"--node-rank {number} is none of {sorted(self._hosts)}"]
            if host is None or unlike:
                connection.send({"refused": f"host {number} was started unlike host 0: {'; '.join(unlike)}"})
                connection.close()
                return
            connection.send({"welcome": True})
            if not host.attach(connection):
                connection.send({"do": "refused", "why": f"there is a host {number} already"})
                connection.close()
        except WireError as error:
            _log.warning("refused: %s", error)
