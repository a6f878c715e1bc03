"""Several engines behind one: who gets a request, and that one that is lost takes nobody along."""

from __future__ import annotations

import pytest

from podquant.engine.backend import OnOutput
from podquant.engine.request import Request
from podquant.errors import EngineStoppedError, RequestError
from podquant.group.messages import Submit
from podquant.group.replicas import Replicas
from tests.group.test_remote_engine import LIMITS, Process, ask, new_engine


def test_a_request_goes_to_the_replica_with_the_fewest_in_flight() -> None:
    engines = [new_engine(), new_engine()]
    replicas = Replicas(engines)
    with pytest.raises(EngineStoppedError, match="the model is loading"):
        replicas.submit(ask("0"), print)
    processes = [Process(engine) for engine in engines]
    assert replicas.limits == LIMITS
    for number in range(4):
        replicas.submit(ask(f"r{number}"), print)
    with pytest.raises(RequestError, match="running already"):
        replicas.submit(ask("r3"), print)
    assert [engine.num_open for engine in engines] == [2, 2]
    for command in [processes[0].next() for _ in range(2)]:
        assert isinstance(command, Submit)
        replicas.abort(command.request_id)
    replicas.submit(ask("r4"), print)
    replicas.submit(ask("r5"), print)
    assert [engine.num_open for engine in engines] == [2, 2]
    assert replicas.stats().num_pages_total == 16
    engines[0].detach("lost")
    assert (replicas.is_ready, replicas.failure) == (True, None)
    replicas.submit(ask("r6"), print)
    assert engines[1].num_open == 3
    engines[1].detach("lost too")
    assert (replicas.is_ready, replicas.failure) == (False, "lost; lost too")


def test_a_replica_that_is_lost_while_it_is_chosen_is_passed_over() -> None:
    engines = [new_engine(), new_engine()]
    replicas = Replicas(engines)
    for engine in engines:
        Process(engine)
    refuse = engines[1].submit

    def lose(request: Request, on_output: OnOutput) -> None:
        engines[1].detach("lost")
        refuse(request, on_output)

    engines[1].submit = lose  # type: ignore[method-assign]
    replicas.submit(ask("a"), print)  # the second has its turn first
    assert (engines[1].is_ready, engines[0].num_open) == (False, 1)
    engines[0].detach("lost too")
    with pytest.raises(EngineStoppedError, match="lost too; lost"):
        replicas.submit(ask("b"), print)
