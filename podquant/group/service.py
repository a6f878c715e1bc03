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
from podquant.engine.start import OnLoad, load_defaults, load_tokenizer, open_model
from podquant.group.children import Children
from podquant.group.fingerprint import Agreement
from podquant.group.group import Group
from podquant.group.hosts import Host, HostAcceptor, LocalHost, RemoteHost, SharedFlags
from podquant.group.launch import Deadlines, Member, members_on
from podquant.group.messages import Report
from podquant.group.remote_engine import RemoteEngine
from podquant.group.replicas import Replicas
from podquant.group.wire import PeerListener


@dataclass(frozen=True)
class GroupOptions:
    """Which hosts serve together, and how they find each other.

    Attributes:
        num_hosts: this one, number 0, and others.
        num_groups: independent replicas of the model.
        address: where host 0 takes in the others, and what they reach it by.
        secret: that all hosts know, and nobody else.
        deadlines: how long to wait for one another.
        max_failed_starts: in a row before a group serves for the first time, then the service ends; None: no limit.
    """

    num_hosts: int
    num_groups: int
    address: tuple[str, int]
    secret: bytes
    deadlines: Deadlines = field(default_factory=Deadlines)
    max_failed_starts: int | None = None


class GroupService:
    """The service on host 0. `start`, then serve with `backend`; `stop` ends all processes on all hosts."""

    def __init__(self, options: EngineOptions, group: GroupOptions, on_load: OnLoad = lambda done, total: None) -> None:
        """`on_load` is told, from a thread, how far the first group is with loading, whenever it loads.

        Raises:
            ConfigError: the numbers of hosts and of groups do not divide one another.
            ClusterError: the address cannot be had.
        """
        self._group_options, self._options, self._on_load = group, options, on_load
        self._members: dict[int, list[tuple[int, Member]]] = {}
        for host in range(group.num_hosts):
            for member in members_on(host, group.num_hosts, group.num_groups):
                self._members.setdefault(member.group, []).append((host, member))
        self._children = Children(group.secret, self._take)
        self._remote = {number: RemoteHost(number, self._take, group.deadlines) for number in range(1, group.num_hosts)}
        self._groups: list[Group] = []
        self._listener = PeerListener(*group.address) if group.num_hosts > 1 else None
        self._acceptor: HostAcceptor | None = None
        self.backend: Backend

    def start(self) -> None:
        """Start every group and wait until all serve.

        Raises:
            PodquantError: the model or the options are wrong, hosts do not come, or processes end again and again.
        """
        shared = self._group_options
        with open_model(self._options, by_ranges=shared.num_hosts > 1) as opened:
            tokenizer, defaults = load_tokenizer(opened), load_defaults(opened)
            options = opened.options  # at one commit for all processes, of all hosts and of every generation
        hosts: Mapping[int, Host] = {0: LocalHost(shared.address[0] or "127.0.0.1", self._children), **self._remote}
        agreement = Agreement()
        for placed in self._members.values():
            engine = RemoteEngine(self._options.model_path, tokenizer, defaults)
            on_load = (lambda done, total: None) if self._groups else self._on_load
            where = [hosts[host] for host, _ in placed]
            members = [member for _, member in placed]
            limit = shared.max_failed_starts
            self._groups.append(Group(members, where, options, shared.deadlines, engine, on_load, agreement, limit))
        engines = [group.engine for group in self._groups]
        self.backend = engines[0] if len(engines) == 1 else Replicas(engines)
        if self._listener is not None:
            flags = SharedFlags(shared.num_hosts, shared.num_groups, self._options)
            self._acceptor = HostAcceptor(self._listener, shared.secret, flags, self._remote)
        for group in self._groups:
            group.start()
        for group in self._groups:
            while not group.settled.wait(0.2):  # in pieces, so that a signal is heard
                pass
            if group.error is not None:
                raise group.error

    def stop(self, drain_seconds: float) -> None:
        """Let requests in flight end for `drain_seconds`, then end everything on every host."""
        stopping = [threading.Thread(target=group.stop, args=(drain_seconds,), daemon=True) for group in self._groups]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()
        for host in self._remote.values():
            host.stop()
        if self._acceptor is not None:
            time.sleep(0.2)  # for the messages to leave
            self._acceptor.close()
        elif self._listener is not None:
            self._listener.close()
        self._children.end_all()

    @property
    def pids(self) -> list[int]:
        """The processes of groups on this host."""
        return self._children.pids

    def _take(self, report: Report) -> None:
        if report.member.group < len(self._groups):
            self._groups[report.member.group].take(report)
