"""A model served by several processes: on this host, host 0, and on the others that come. Puts the parts together.

Knows nothing of HTTP, flags or Ray.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from podquant.engine.backend import Backend
from podquant.engine.options import EngineOptions
from podquant.engine.start import OnLoad, load_tokenizer, open_model
from podquant.group.children import Children, Word
from podquant.group.group import Group
from podquant.group.hosts import Host, LocalHost, Reception, RemoteHost, Roll
from podquant.group.launch import Deadlines, Place, place_of
from podquant.group.remote_engine import RemoteEngine
from podquant.group.replicas import Replicas
from podquant.group.wire import Listener


@dataclass(frozen=True)
class Members:
    """Which hosts serve together, and how they find each other.

    Attributes:
        num_hosts: this one, number 0, and others.
        num_groups: independent replicas of the model.
        address: where host 0 takes in the others, and what they reach it by.
        secret: that all hosts know, and nobody else.
        deadlines: how long to wait for one another.
    """

    num_hosts: int
    num_groups: int
    address: tuple[str, int]
    secret: bytes
    deadlines: Deadlines = field(default_factory=Deadlines)


class GroupService:
    """The service on host 0. `start`, then serve with `backend`; `stop` ends all processes on all hosts."""

    def __init__(self, options: EngineOptions, members: Members, on_load: OnLoad = lambda done, total: None) -> None:
        """`on_load` is told, from a thread, how far the first group is with loading, whenever it loads.

        Raises:
            ConfigError: hosts and replicas do not come out even.
            ClusterError: the address cannot be had.
        """
        self._members, self._options, self._on_load = members, options, on_load
        places: dict[int, list[tuple[int, Place]]] = {}
        for host in range(members.num_hosts):
            for place in place_of(host, members.num_hosts, members.num_groups):
                places.setdefault(place.group, []).append((host, place))
        self._places = places
        self._children = Children(members.secret, self._hear)
        self._remote = {
            number: RemoteHost(number, self._hear, members.deadlines) for number in range(1, members.num_hosts)
        }
        self._groups: list[Group] = []
        self._listener = Listener(*members.address) if members.num_hosts > 1 else None
        self._reception: Reception | None = None
        self.backend: Backend

    def start(self) -> None:
        """Start every group and wait until all serve.

        Raises:
            PodquantError: the model or the options are wrong, hosts do not come, or processes end again and again.
        """
        members = self._members
        with open_model(self._options, by_ranges=members.num_hosts > 1) as opened:
            tokenizer = load_tokenizer(opened)
            options = opened.options  # at one commit for all processes, of all hosts and of every generation
        hosts: Mapping[int, Host] = {0: LocalHost(members.address[0] or "127.0.0.1", self._children), **self._remote}
        for placed in self._places.values():
            engine = RemoteEngine(self._options.model_path, tokenizer)
            on_load = (lambda done, total: None) if self._groups else self._on_load
            where = [hosts[host] for host, _ in placed]
            places = [place for _, place in placed]
            self._groups.append(Group(places, where, options, members.deadlines, engine, on_load))
        engines = [group.engine for group in self._groups]
        self.backend = engines[0] if len(engines) == 1 else Replicas(engines)
        if self._listener is not None:
            roll = Roll(members.num_hosts, members.num_groups, self._options)
            self._reception = Reception(self._listener, members.secret, roll, self._remote)
        for group in self._groups:
            group.start()
        for group in self._groups:
            while not group.settled.wait(0.2):  # in pieces, so that a signal is heard
                pass
            if group.error is not None:
                raise group.error

    def stop(self, drain_seconds: float) -> None:
        """Let requests on the way end for `drain_seconds`, then end everything on every host."""
        stopping = [threading.Thread(target=group.stop, args=(drain_seconds,), daemon=True) for group in self._groups]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()
        for host in self._remote.values():
            host.stop()
        if self._reception is not None:
            time.sleep(0.2)  # for the words to leave
            self._reception.close()
        elif self._listener is not None:
            self._listener.close()
        self._children.end_all()

    @property
    def pids(self) -> list[int]:
        """The processes of groups on this host."""
        return self._children.pids

    def _hear(self, word: Word) -> None:
        if word.place.group < len(self._groups):
            self._groups[word.place.group].hear(word)
