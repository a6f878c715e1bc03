"""The life of a group: what ends it for good, and what is only a lost generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from podquant.checkpoint.fingerprint import Fingerprint
from podquant.engine.options import EngineOptions
from podquant.errors import ArtifactError, ConfigError, PodquantError
from podquant.group.fingerprint import Agreement
from podquant.group.group import Group
from podquant.group.launch import Deadlines, Launch, Member
from podquant.group.messages import Ended, EngineCommand, EngineReady, Failed, FromMember, Report
from tests.group.hosts import wait_until
from tests.group.test_remote_engine import FINGERPRINTS, LIMITS, STATS, new_engine

MEMBER = Member(0, 0, 1)
READY = EngineReady(LIMITS, STATS, FINGERPRINTS)
LIVES = (READY,)


class Here:
    """A `Host` whose process says, at each launch, what is given; an exception is raised instead."""

    absence = None
    address = "127.0.0.1"

    def __init__(self, *lives: tuple[FromMember, ...] | Exception) -> None:
        self._lives = iter(lives)
        self.take: Callable[[Report], None] = lambda report: None
        self.generations: list[int] = []

    def launch(self, launch: Launch) -> None:
        self.generations.append(launch.generation)
        said = next(self._lives, LIVES)
        if isinstance(said, Exception):
            raise said
        for message in said:
            self.take(Report(launch.member, launch.generation, message))

    def command(self, group: int, generation: int, command: EngineCommand) -> None:
        self.take(Report(MEMBER, generation, Ended("by itself")))

    def end(self, group: int) -> None:
        pass


@contextmanager
def running(host: Here, agreement: Agreement | None = None, **options: int) -> Iterator[Group]:
    engine, deadlines = new_engine(), Deadlines()
    agreement = agreement or Agreement()
    group = Group(
        [MEMBER], [host], EngineOptions("m"), deadlines, engine, lambda done, total: None, agreement, **options
    )
    host.take = group.take
    group.start()
    yield group
    group.stop(0.0)


FAULTS: list[tuple[FromMember, ...] | Exception] = [
    OSError(24, "Too many open files"),
    RuntimeError("can't start new thread"),
    MemoryError(),
    (Failed("TransientStorageError", "the store is out of reach"),),
    (Failed("ClusterError", "rank 1 has not come"),),
    (Failed("", "XlaRuntimeError: out of memory"),),
    (Ended("ended by SIGKILL"),),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_what_may_pass_is_a_lost_generation(fault: tuple[FromMember, ...] | Exception) -> None:
    host = Here(fault)
    with running(host) as group:
        assert group.settled.wait(20)
        assert (group.error, group.engine.is_ready, host.generations) == (None, True, [1, 2])


@pytest.mark.parametrize("fault", FAULTS[:1] + FAULTS[-1:], ids=str)
def test_what_may_pass_is_a_lost_generation_later_too(fault: tuple[FromMember, ...] | Exception) -> None:
    host = Here(LIVES, fault)
    with running(host) as group:
        assert group.settled.wait(20)
        group.take(Report(MEMBER, 1, Ended("ended by SIGKILL")))
        wait_until(lambda: host.generations == [1, 2, 3] and group.engine.is_ready, 20, "it serves again")


def test_the_service_is_not_given_up_unless_it_is_told_to() -> None:
    lost: tuple[FromMember, ...] = (Ended("ended by SIGKILL"),)
    with running(Here(*[lost] * 3)) as group:
        assert group.settled.wait(20)
        assert group.error is None
    with running(Here(*[lost] * 3), max_failed_starts=2) as group:
        assert group.settled.wait(20)
        assert str(group.error) == "the group ended 2 times before it served: rank 0 ended: ended by SIGKILL"


@pytest.mark.parametrize("name", ["ArtifactError", "ConfigError", "CheckpointError", "CapacityError"])
def test_what_another_start_would_meet_again_ends_it_at_once(name: str) -> None:
    host = Here((Failed(name, "why"),))
    with running(host) as group:
        assert group.settled.wait(20)
        assert isinstance(group.error, PodquantError)
        assert (type(group.error).__name__, str(group.error), host.generations) == (name, "why", [1])


def test_once_it_has_served_nothing_ends_it() -> None:
    host = Here(LIVES, (Failed("ArtifactError", "why"),))
    with running(host) as group:
        assert group.settled.wait(20)
        group.take(Report(MEMBER, 1, Failed(ArtifactError.__name__, "why")))
        wait_until(lambda: host.generations == [1, 2, 3] and group.engine.is_ready, 20, "it serves again")


def test_a_replica_with_other_weights_does_not_serve_beside_the_first() -> None:
    agreement = Agreement()
    other = replace(READY, fingerprints=replace(FINGERPRINTS, weights=Fingerprint("v" * 64, "samples")))
    with running(Here(), agreement) as first, running(Here((READY,)), agreement) as second:
        assert first.settled.wait(20)
        assert second.settled.wait(20)
        assert (first.error, second.error) == (None, None)
    with running(Here((other,)), agreement) as third:
        assert third.settled.wait(20)
        assert not third.engine.is_ready
        assert isinstance(third.error, ConfigError)
        assert str(third.error).startswith("group 0 refused: its weights ")
