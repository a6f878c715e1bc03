"""What the processes of a group are told, as plain data: options of the engine, addresses, deadlines.

Knows nothing of sockets, processes or devices.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from podquant.engine.options import EngineOptions
from podquant.errors import ConfigError

OWN_OPTIONS = ("model_path", "download_dir", "quantization_config_path")
"""Options that are each host's own business: fingerprints tell whether what is behind them is the same."""


@dataclass(frozen=True)
class Deadlines:
    """How long the processes of a group wait for one another, in seconds. Nothing waits without one.

    Attributes:
        liveness: without a sign of life a process, or a host, is taken for dead.
        step: a step of the engine may take, once everything is compiled.
        arrival: for every host to come, at first and after a loss.
        start: to load and compile.
        drain: requests on the way may go on when the group is told to stop.
    """

    liveness: float = 10.0
    step: float = 120.0
    arrival: float = 600.0
    start: float = 1800.0
    drain: float = 30.0

    @property
    def beat(self) -> float:
        """Between two signs of life."""
        return self.liveness / 5


@dataclass(frozen=True)
class Place:
    """Where a process stands in its group.

    Attributes:
        group: which of several independent groups, from 0.
        rank: in the group; 0 schedules.
        num_ranks: processes of the group, one a host.
        on_host: which of the groups that share its host.
        num_on_host: groups that share its host.
    """

    group: int
    rank: int
    num_ranks: int
    on_host: int = 0
    num_on_host: int = 1


@dataclass(frozen=True)
class Launch:
    """One life of one process of a group.

    Attributes:
        place: which process.
        generation: how often the group was started before; processes of different ones never meet.
        nonce: fresh for each generation; with the group's secret it gives the key of the step channel.
        options: of the engine.
        deadlines: how long to wait.
        host: address of this host, as the others reach it; rank 0 listens there.
        step_address, coordinator: of rank 0, as `host:port`; empty for rank 0, which chooses the ports.
    """

    place: Place
    generation: int
    nonce: str
    options: EngineOptions
    deadlines: Deadlines
    host: str
    step_address: str = ""
    coordinator: str = ""

    def encode(self) -> dict[str, Any]:
        """As JSON's values."""
        return asdict(self)


def decode_launch(value: Mapping[str, Any]) -> Launch:
    """The launch behind `Launch.encode`."""
    parts = {"place": Place, "options": EngineOptions, "deadlines": Deadlines}
    return Launch(**{key: parts[key](**part) if key in parts else part for key, part in value.items()})


def new_nonce() -> str:
    """Fresh text for a generation."""
    return secrets.token_hex(32)


def step_key(secret: bytes, nonce: str) -> bytes:
    """The secret of one generation's step channel: processes left from an earlier one do not know it."""
    return hmac.digest(secret, b"step " + nonce.encode(), "sha256")


def place_of(host: int, num_hosts: int, num_groups: int) -> list[Place]:
    """The processes that run on a host: one, or one for each of the groups that share it.

    Raises:
        ConfigError: groups and hosts do not come out even.
    """
    if num_groups <= num_hosts:
        if num_hosts % num_groups:
            raise ConfigError(
                f"--dp-size {num_groups}: {num_hosts} hosts (--nnodes) cannot be shared out among so many replicas "
                "evenly: choose a divisor or a multiple"
            )
        num_ranks = num_hosts // num_groups
        group, rank = divmod(host, num_ranks)
        return [Place(group, rank, num_ranks)]
    if num_groups % num_hosts:
        raise ConfigError(
            f"--dp-size {num_groups}: so many replicas cannot be shared out among {num_hosts} hosts (--nnodes) evenly: "
            "choose a multiple"
        )
    count = num_groups // num_hosts
    return [Place(host * count + each, 0, 1, each, count) for each in range(count)]
