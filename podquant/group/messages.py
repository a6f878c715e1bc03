"""Every message between the processes of a service, and which of them each kind of connection carries.

Three kinds of connections: of host 0 with each other host; of a host with each process that it started, a member of a
group; and of rank 0 of a group with its other ranks. Floats survive exactly. Knows nothing of bytes or sockets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from podquant.engine.backend import EngineStats
from podquant.engine.limits import Limits
from podquant.engine.request import Output, SamplingParams
from podquant.group.codec import Array, Codec
from podquant.group.fingerprint import Fingerprints
from podquant.group.launch import Launch, Member

VERSION = 4
"""Of everything in this file; whoever connects says theirs first, and another one is refused. Raise it with any change
here, or to how messages are written."""

type Flag = str | int | float | bool | None


@dataclass(frozen=True)
class Heartbeat:
    """Nothing new: the sender lives."""


@dataclass(frozen=True)
class Welcome:
    """Whoever has said hello may stay."""


@dataclass(frozen=True)
class Refusal:
    """Whoever has said hello may not. `is_final`: nor will it ever, as it was started."""

    reason: str
    is_final: bool


# A host to a member that it started.


@dataclass(frozen=True)
class Start:
    """The first message: what to be. `step_key`, as hexadecimal digits, is the secret of its step channel."""

    launch: Launch
    step_key: str


@dataclass(frozen=True)
class Submit:
    """A request to run. Without a prompt it has that of the request before it, as the choices of one call do."""

    request_id: str
    prompt: Array
    params: SamplingParams
    cache_salt: str


@dataclass(frozen=True)
class Abort:
    """A request to give up."""

    request_id: str


@dataclass(frozen=True)
class Stop:
    """Take no more requests, let those in flight end for so long, and end."""

    drain_seconds: float


type EngineCommand = Submit | Abort | Stop
type ToMember = Start | EngineCommand | Heartbeat
TO_MEMBER: Codec[ToMember] = Codec(ToMember)


# A member to the host that started it.


@dataclass(frozen=True)
class Listening:
    """Where rank 0 is to be reached, each as `host:port`: the step channel, and JAX's coordinator."""

    step_address: str
    coordinator: str


@dataclass(frozen=True)
class Loading:
    """Bytes read so far, and bytes of the model."""

    done: int
    total: int


@dataclass(frozen=True)
class Ready:
    """A rank that follows has loaded and compiled."""


@dataclass(frozen=True)
class EngineReady:
    """Rank 0 takes requests, and what it computes with."""

    limits: Limits
    stats: EngineStats
    fingerprints: Fingerprints


@dataclass(frozen=True)
class MemberHeartbeat:
    """How long the member has been at its present step, in seconds, and what rank 0's engine does."""

    busy_seconds: float
    stats: EngineStats | None


@dataclass(frozen=True)
class Outputs:
    """What requests have come to."""

    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class Failed:
    """The member cannot go on. `error` names the class of podquant's own errors; empty for another."""

    error: str
    text: str


BY_ITSELF = "by itself"


@dataclass(frozen=True)
class Ended:
    """The member is gone, or going. Also said of a member, by the host that sees its process end."""

    reason: str


type EngineNews = Outputs | MemberHeartbeat
type FromMember = Listening | Loading | Ready | EngineReady | EngineNews | Failed | Ended
FROM_MEMBER: Codec[FromMember] = Codec(FromMember)


# A host to host 0.


@dataclass(frozen=True)
class HostHello:
    """Who calls, and the flags it was started with, but for those that are each host's own."""

    host: int
    flags: Mapping[str, Flag]


@dataclass(frozen=True)
class Report:
    """What a member on the host said, or that it has ended."""

    member: Member
    generation: int
    message: FromMember


type FromHost = HostHello | Report | Heartbeat
FROM_HOST: Codec[FromHost] = Codec(FromHost)


# Host 0 to another host.


@dataclass(frozen=True)
class StartMember:
    """Start a process."""

    launch: Launch


@dataclass(frozen=True)
class CommandMember:
    """Pass a command on to a group's member, if it is of this generation."""

    group: int
    generation: int
    command: EngineCommand


@dataclass(frozen=True)
class EndMember:
    """End a group's member at once."""

    group: int


@dataclass(frozen=True)
class Shutdown:
    """The service ends: so does the host."""


type ToHost = Welcome | Refusal | StartMember | CommandMember | EndMember | Shutdown | Heartbeat
TO_HOST: Codec[ToHost] = Codec(ToHost)


# The step channel: another rank to rank 0, and rank 0 to the others.


@dataclass(frozen=True)
class RankHello:
    """Who calls, and what it would compute with."""

    rank: int
    fingerprints: Fingerprints


@dataclass(frozen=True)
class Step:
    """A step to run.

    Attributes:
        number: from 1, without a gap.
        num_tokens, scores: the bucket it is compiled for.
        arrays: the host values it takes, packed.
    """

    number: int
    num_tokens: int
    scores: bool
    arrays: tuple[Array, ...]


@dataclass(frozen=True)
class EndOfSteps:
    """No step follows."""


FROM_RANK: Codec[RankHello] = Codec(RankHello)
type ToRank = Welcome | Refusal | Step | EndOfSteps | Heartbeat
TO_RANK: Codec[ToRank] = Codec(ToRank)
