"""An engine elsewhere: what is passed on, what comes back, and what a loss ends."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace

import pytest

from podquant.checkpoint.fingerprint import Fingerprint
from podquant.engine.backend import EngineStats
from podquant.engine.defaults import PLAIN
from podquant.engine.limits import Limits
from podquant.engine.request import FinishReason, Output, Request, SamplingParams
from podquant.errors import EngineStoppedError, QueueFullError, RequestError, RequestTooLongError
from podquant.group.fingerprint import Fingerprints
from podquant.group.messages import Abort, EngineCommand, EngineReady, MemberHeartbeat, Outputs, Stop, Submit
from podquant.group.remote_engine import RemoteEngine

LIMITS = Limits(512, 64, 1024, max_running=2, max_waiting=2, max_logprobs=5)
STATS = EngineStats(
    num_running=1,
    num_waiting=0,
    num_pages_used=2,
    num_pages_total=8,
    num_prompt_tokens=10,
    num_generated_tokens=20,
    num_preemptions=0,
    num_cached_tokens=0,
    num_compiled=3,
    num_draft_tokens=0,
    num_accepted_tokens=0,
)


FINGERPRINTS = Fingerprints(Fingerprint("w" * 64, "samples"), "c" * 64, "k" * 64)


class Process:
    """The other end of a RemoteEngine: what it was told."""

    def __init__(self, engine: RemoteEngine) -> None:
        self.engine = engine
        self.told: queue.SimpleQueue[EngineCommand] = queue.SimpleQueue()
        engine.attach(self.told.put, EngineReady(LIMITS, STATS, FINGERPRINTS))

    def next(self) -> EngineCommand:
        """What it was told next."""
        return self.told.get(timeout=10)

    def say(self, output: Output) -> None:
        self.engine.take(Outputs((output,)))


def submitted(command: EngineCommand) -> tuple[str, list[int]]:
    """The id and the prompt that a process is sent."""
    assert isinstance(command, Submit)
    return command.request_id, command.prompt.tolist()


def new_engine() -> RemoteEngine:
    return RemoteEngine("model", None, PLAIN)


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
    assert submitted(process.next()) == ("a", [1])
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
    assert [submitted(process.next())[0] for _ in range(4)] == list("0123")
    assert process.next() == Abort("0")
    assert submitted(process.next())[0] == "4"


def test_choices_of_one_prompt_send_it_once() -> None:
    engine = new_engine()
    process = Process(engine)
    prompt, equal = (7, 8, 9), (7, 8, 9, 10)[:3]
    for number, ids in enumerate((prompt, prompt, equal, prompt)):
        engine.submit(Request(str(number), ids, SamplingParams()), print)
    sent = [submitted(process.next()) for _ in range(4)]
    assert sent == [("0", [7, 8, 9]), ("1", []), ("2", [7, 8, 9]), ("3", [7, 8, 9])]


def test_a_process_that_is_stuck_holds_up_nobody() -> None:
    engine = new_engine()
    may_go_on = threading.Event()

    def send(command: EngineCommand) -> None:
        may_go_on.wait(60)

    engine.attach(send, EngineReady(LIMITS, STATS, FINGERPRINTS))
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
    process = Process(engine)
    assert state_of(engine) == (None, True)
    assert engine.stats().num_generated_tokens == 40
    assert engine.stats().num_running == 1
    engine.take(MemberHeartbeat(0.0, replace(STATS, num_running=2, num_generated_tokens=25)))
    engine.take(MemberHeartbeat(0.0, None))
    assert (engine.stats().num_running, engine.stats().num_generated_tokens) == (2, 45)
    engine.stop(1.5)
    assert process.next() == Stop(1.5)
    assert state_of(engine) == (None, False)
    with pytest.raises(EngineStoppedError, match="shutting down"):
        engine.submit(ask("c"), print)
