"""The plain parts: places of processes, messages, an engine elsewhere, several engines behind one."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from podquant.engine.backend import OnOutput
from podquant.engine.limits import Limits
from podquant.engine.options import EngineOptions
from podquant.engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from podquant.errors import ConfigError, EngineStoppedError, QueueFullError, RequestError, RequestTooLongError
from podquant.group.launch import Deadlines, Launch, Place, decode_launch, new_nonce, place_of, step_key
from podquant.group.messages import decode_output, decode_request, encode_output, encode_request
from podquant.group.remote_engine import RemoteEngine
from podquant.group.replicas import Replicas

LIMITS = Limits(512, 64, 1024, max_running=2, max_waiting=2, max_logprobs=5)
STATS = {
    "num_running": 1,
    "num_waiting": 0,
    "num_pages_used": 2,
    "num_pages_total": 8,
    "num_prompt_tokens": 10,
    "num_generated_tokens": 20,
    "num_preemptions": 0,
}


def over_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_every_process_has_its_place() -> None:
    assert place_of(0, 1, 1) == [Place(0, 0, 1)]
    assert [place_of(host, 4, 1) for host in range(4)] == [[Place(0, rank, 4)] for rank in range(4)]
    assert [place_of(host, 4, 2)[0] for host in range(4)] == [
        Place(0, 0, 2),
        Place(0, 1, 2),
        Place(1, 0, 2),
        Place(1, 1, 2),
    ]
    assert place_of(1, 2, 4) == [Place(2, 0, 1, 0, 2), Place(3, 0, 1, 1, 2)]


@pytest.mark.parametrize(("hosts", "groups"), [(4, 3), (3, 2), (2, 3)])
def test_replicas_that_do_not_come_out_even_are_refused(hosts: int, groups: int) -> None:
    with pytest.raises(ConfigError, match=rf"--dp-size {groups}: .*{hosts} hosts"):
        place_of(0, hosts, groups)


def test_a_launch_survives_json_and_each_generation_has_its_key() -> None:
    launch = Launch(
        Place(1, 2, 4), 7, new_nonce(), EngineOptions("m", tp_size=4), Deadlines(liveness=2.5), "h", "h:1", "h:2"
    )
    assert decode_launch(over_json(launch.encode())) == launch
    assert len({step_key(b"s", launch.nonce), step_key(b"s", new_nonce()), step_key(b"t", launch.nonce)}) == 3


def test_requests_and_outputs_survive_json() -> None:
    params = SamplingParams(7, 1, 0.3, 0.9, 5, 0.1, 1.1, 0.2, -0.3, 42, ("a", "ü"), (3, 4), True, 2, 0)
    request = Request("id", (1, 2), params)
    assert decode_request(over_json(encode_request(request))) == request
    entry = TokenLogprobs(3, -0.1, ((3, -0.1), (4, -2.30258509299)))
    for output in (
        Output("id", (1,), "é", (entry,)),
        Output("id", (), "", (), (None, entry), FinishReason.STOP, "stop", None),
        Output("id", (2,), finish_reason=FinishReason.STOP, stop_reason=2),
        Output("id", finish_reason=FinishReason.ERROR, error="lost"),
    ):
        assert decode_output(over_json(encode_output(output))) == output


class Process:
    """The other end of a RemoteEngine: what it was told."""

    def __init__(self, engine: RemoteEngine) -> None:
        self.engine = engine
        self.told: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        engine.attach(lambda body: self.told.put(over_json(body)), asdict(LIMITS), STATS)

    def next(self) -> tuple[str, str | None]:
        """What it was told next, and about which request."""
        body = self.told.get(timeout=10)
        return body["do"], body["request"]["id"] if body["do"] == "submit" else body.get("id")

    def say(self, output: Output) -> None:
        self.engine.hear({"is": "news", "outputs": [over_json(encode_output(output))]})


def new_engine() -> RemoteEngine:
    return RemoteEngine("model", None)


def state_of(engine: RemoteEngine) -> tuple[str | None, bool]:
    return engine.failure, engine.is_ready


def ask(request_id: str) -> Request:
    return Request(request_id, (1,), SamplingParams())


def test_news_reach_those_who_asked_until_the_end() -> None:
    engine = new_engine()
    with pytest.raises(EngineStoppedError, match="does not serve: the model is loading"):
        engine.submit(ask("a"), print)
    assert (engine.is_ready, engine.failure) == (False, None)
    process = Process(engine)
    heard: list[Output] = []
    engine.submit(ask("a"), heard.append)
    assert process.next() == ("submit", "a")
    with pytest.raises(RequestError, match="running already"):
        engine.submit(ask("a"), print)
    with pytest.raises(RequestTooLongError, match="maximum context length is 64") as caught:
        engine.submit(Request("long", (1,) * 64, SamplingParams()), print)
    assert caught.value.param == "prompt"
    process.say(Output("a", (5,), "x"))
    process.say(Output("b", (6,)))
    process.say(Output("a", (7,), "y", finish_reason=FinishReason.LENGTH))
    process.say(Output("a", (8,)))
    assert [(output.token_ids, output.text) for output in heard] == [((5,), "x"), ((7,), "y")]
    assert engine.num_open == 0
    assert engine.limits == LIMITS


def test_no_more_are_passed_on_than_the_process_takes() -> None:
    engine = new_engine()
    process = Process(engine)
    for number in range(4):
        engine.submit(ask(str(number)), print)
    with pytest.raises(QueueFullError, match="4 requests are running or waiting"):
        engine.submit(ask("4"), print)
    engine.abort("0")
    engine.submit(ask("4"), print)
    told = [process.next() for _ in range(6)]
    assert told == [*(("submit", str(number)) for number in range(4)), ("abort", "0"), ("submit", "4")]


def test_a_process_that_is_stuck_holds_up_nobody() -> None:
    engine = new_engine()
    may_go_on = threading.Event()

    def send(body: Mapping[str, Any]) -> None:
        may_go_on.wait(60)

    engine.attach(send, asdict(LIMITS), STATS)
    heard: list[Output] = []
    for number in range(4):
        engine.submit(ask(str(number)), heard.append)
    engine.detach("gave no heartbeat")
    assert [output.error for output in heard] == ["gave no heartbeat"] * 4
    may_go_on.set()


def test_a_loss_ends_what_is_in_flight_with_its_reason_and_totals_go_on() -> None:
    engine = new_engine()
    process = Process(engine)
    heard: list[Output] = []
    engine.submit(ask("a"), heard.append)
    process.say(Output("a", finish_reason=FinishReason.ERROR, error="a symptom"))
    assert heard == []
    engine.detach("rank 1 ended")
    assert [(output.finish_reason, output.error) for output in heard] == [(FinishReason.ERROR, "rank 1 ended")]
    engine.tell("rank 0 has read 5 %")
    assert engine.failure == "rank 1 ended; rank 0 has read 5 %"
    with pytest.raises(EngineStoppedError, match="rank 1 ended"):
        engine.submit(ask("b"), print)
    Process(engine)
    assert state_of(engine) == (None, True)
    assert engine.stats().num_generated_tokens == 40
    assert engine.stats().num_running == 1
    engine.stop(1.5)
    assert state_of(engine) == (None, False)
    with pytest.raises(EngineStoppedError, match="shutting down"):
        engine.submit(ask("c"), print)


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
    for request_id in [processes[0].next()[1] for _ in range(2)]:
        replicas.abort(str(request_id))
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
