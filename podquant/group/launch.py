"""The members of a group, which are its processes, and what each is started with: options, addresses, deadlines.

Plain values. Knows nothing of sockets, processes or devices.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass

from podquant.engine.options import EngineOptions
from podquant.errors import ConfigError

OWN_OPTIONS = ("model_path", "download_dir", "quantization_config_path", "compilation_cache_dir")
"""Options that are each host's own business: fingerprints tell whether what is behind them is the same."""


@dataclass(frozen=True)
class Deadlines:
    """How long the processes of a group wait for one another, in seconds. Nothing waits without one.

    Attributes:
        liveness: a process, or a host, without a heartbeat for so long is taken for dead.
        step: a step of the engine may take, once everything is compiled.
        arrival: for every host to come, at first and after a loss.
        start: to load and compile.
        drain: requests in flight may continue when the group is told to stop.
    """

    liveness: float = 10.0
    step: float = 120.0
    arrival: float = 600.0
    start: float = 1800.0
    drain: float = 30.0

    @property
    def heartbeat(self) -> float:
        """Between two heartbeats."""
        return self.liveness / 5


@dataclass(frozen=True)
class Member:
    """One process of a group.

    Attributes:
        group: which of several independent groups, from 0.
        rank: in the group; 0 schedules.
        num_ranks: members of the group, one a host.
        index_on_host: which of the groups that share its host.
        num_on_host: groups that share its host.
    """

    group: int
    rank: int
    num_ranks: int
    index_on_host: int = 0
    num_on_host: int = 1


@dataclass(frozen=True)
class Launch:
    """One life of one member.

    Attributes:
        member: which one.
        generation: how often the group was started, this time included; members of different ones never meet.
        nonce: fresh for each generation; with the group's secret it gives the key of the step channel.
        options: of the engine.
        deadlines: how long to wait.
        host: address of this host, as the others reach it; rank 0 listens there.
        step_address, coordinator: of rank 0, as `host:port`; empty for rank 0, which chooses the ports.
    """

    member: Member
    generation: int
    nonce: str
    options: EngineOptions
    deadlines: Deadlines
    host: str
    step_address: str = ""
    coordinator: str = ""


def new_nonce() -> str:
    """Fresh text for a generation."""
    return secrets.token_hex(32)


def step_key(secret: bytes, nonce: str) -> bytes:
    """The secret of one generation's step channel: processes left from an earlier one do not know it."""
    return hmac.digest(secret, b"step " + nonce.encode(), "sha256")


def members_on(host: int, num_hosts: int, num_groups: int) -> list[Member]:
    """The members on a host: one, or one of each of the groups that share it.

    Raises:
        ConfigError: neither number divides the other.
    """
    if num_hosts % num_groups and num_groups % num_hosts:
        raise ConfigError(
            f"--dp-size and --nnodes must divide one another, got --dp-size {num_groups} and --nnodes {num_hosts}"
        )
    if num_groups <= num_hosts:
        num_ranks = num_hosts // num_groups
        group, rank = divmod(host, num_ranks)
        return [Member(group, rank, num_ranks)]
    count = num_groups // num_hosts
    return [Member(host * count + each, 0, 1, each, count) for each in range(count)]
