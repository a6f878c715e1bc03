"""The engine on reference checkpoints: the same tokens whatever else runs, aborts, limits, failures, draining."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from podquant.engine.engine import LocalEngine
from podquant.engine.executor import Dispatched, StepResult
from podquant.engine.options import EngineOptions
from podquant.engine.request import FinishReason, Output, Request, SamplingParams
from podquant.engine.start import start_engine
from podquant.engine.steps import Step
from podquant.errors import EngineStoppedError, QueueFullError, RequestError, RequestTooLongError
from tests.matrix import MATRIX

pytestmark = pytest.mark.slow

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
CHOOSER = np.random.default_rng(0)
PROMPTS = [CHOOSER.integers(3, 500, length).tolist() for length in (24, 5, 17, 31)]


@contextmanager
def running(name: str = "llama", rules: str | None = None, **more: Any) -> Iterator[LocalEngine]:
    """A started engine of few shapes, in float32."""
    options = {"max_running_requests": 2, "chunked_prefill_size": 8, "page_size": 16, "max_total_tokens": 1024}
    engine = start_engine(
        EngineOptions(
            str(GOLDENS / name),
            rules,
            device="cpu",
            dtype="float32",
            skip_tokenizer_init=True,
            skip_server_warmup=True,
            **(options | more),
        )
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    with running() as engine:
        yield engine


def params(**more: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 24, "temperature": 0.0, "ignore_eos": True} | more))


def run(engine: LocalEngine, requests: Sequence[Request]) -> dict[str, list[Output]]:
    """All news of each request, submitted together."""
    news: queue.SimpleQueue[Output] = queue.SimpleQueue()
    outputs: dict[str, list[Output]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request, news.put)
    left = len(requests)
    while left:
        output = news.get(timeout=120)
        outputs[output.request_id].append(output)
        left -= output.finish_reason is not None
    return outputs


def tokens(engine: LocalEngine, prompts: Sequence[Sequence[int]], **more: Any) -> list[list[int]]:
    requests = [Request(str(i), tuple(prompt), params(**more)) for i, prompt in enumerate(prompts)]
    return [[token for output in news for token in output.token_ids] for news in run(engine, requests).values()]


def idle(engine: LocalEngine) -> bool:
    stats = engine.stats()
    return (stats.num_running, stats.num_waiting, stats.num_pages_used) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "rules", "cache"),
    [
        pytest.param("llama", None, "auto", marks=MATRIX),
        pytest.param("llama3-rope", "int8.yaml", "int8", marks=MATRIX),
        ("mistral-window", "int8_w8a8_keep_embedding.yaml", "fp8"),
        pytest.param("qwen2", "fp8_w8a8_keep_embedding.yaml", "auto", marks=MATRIX),
        pytest.param("qwen2-mha", "fp8_keep_embedding.yaml", "int8", marks=MATRIX),
        ("qwen3", "int8_keep_embedding.yaml", "int8"),
        pytest.param("deepseek_v2", "int8.yaml", "int8", marks=MATRIX),
        ("qwen1-long", None, "auto"),  # trained on 8 tokens: what is past them depends on how long the whole prompt is
    ],
)
def test_one_or_many_whole_or_in_pieces_give_the_same_tokens(name: str, rules: str | None, cache: str) -> None:
    with running(name, rules, kv_cache_dtype=cache, disable_radix_cache=True) as engine:
        prompts = [[token % engine.limits.vocab_size for token in prompt] for prompt in PROMPTS]
        many = tokens(engine, prompts)
        alone = [tokens(engine, [prompt])[0] for prompt in prompts]
    with running(name, rules, kv_cache_dtype=cache, chunked_prefill_size=4) as engine:
        pieces = tokens(engine, prompts)
        assert engine.stats().num_cached_tokens == 0
        again = tokens(engine, prompts)
        # all prompts but the one that fills no page; and none where keys depend on how long a prompt is
        assert engine.stats().num_cached_tokens == (0 if name == "qwen1-long" else 3 * 16)
        longer = [prompt + more[:9] for prompt, more in zip(prompts, alone, strict=True)]
        turns = tokens(engine, longer, max_tokens=15)
    assert all(len(each) == 24 for each in alone)
    assert many == alone
    assert pieces == alone
    assert again == alone
    if name != "qwen1-long":
        assert turns == [each[9:] for each in alone]


def test_a_pool_too_small_for_all_gives_the_same_tokens(engine: LocalEngine) -> None:
    expected = tokens(engine, PROMPTS, max_tokens=60)
    with running(max_total_tokens=112) as small:
        assert tokens(small, PROMPTS, max_tokens=60) == expected
        assert small.stats().num_preemptions > 0
        assert idle(small)


PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2}


def test_penalties_are_the_same_alone_together_in_pieces_and_preempted(engine: LocalEngine) -> None:
    expected = tokens(engine, PROMPTS, max_tokens=60, **PENALTIES)
    assert expected != tokens(engine, PROMPTS, max_tokens=60)
    assert [tokens(engine, [prompt], max_tokens=60, **PENALTIES)[0] for prompt in PROMPTS[:2]] == expected[:2]
    with running(max_total_tokens=112, chunked_prefill_size=4, tp_size=2) as small:
        assert tokens(small, PROMPTS, max_tokens=60, **PENALTIES) == expected
        assert small.stats().num_preemptions > 0


def test_penalties_are_taken_from_the_logits_that_are_reported() -> None:
    """Greedy under penalties is the best of the reported log-probabilities less what each token has coming."""
    with running(max_logprobs=512) as engine:
        asked = params(presence_penalty=0.4, frequency_penalty=0.3, logprobs=512)
        entries = [e for output in run(engine, [Request("p", (5, 6), asked)])["p"] for e in output.logprobs]
    counts = np.zeros(512)
    for entry in entries:
        raw = np.zeros(512)
        raw[[token for token, _ in entry.top]] = [value for _, value in entry.top]
        assert entry.token_id == int((raw - 0.3 * counts - 0.4 * (counts > 0)).argmax())
        assert entry.logprob == raw[entry.token_id]
        counts[entry.token_id] += 1
    assert any(entry.token_id != entry.top[0][0] for entry in entries)


def test_a_strong_repetition_penalty_repeats_nothing(engine: LocalEngine) -> None:
    hard = {"repetition_penalty": 100.0, "max_tokens": 60}
    for prompt, output in zip(PROMPTS, tokens(engine, PROMPTS, **hard), strict=True):
        assert len({*output}) == 60
        assert not {*prompt} & {*output}


def test_no_end_token_is_chosen_before_min_tokens(engine: LocalEngine) -> None:
    (free,) = tokens(engine, PROMPTS[:1], max_tokens=40)
    ends = (free[0], free[2], 10**12)  # the last is no token of any model
    (stopped,) = tokens(engine, PROMPTS[:1], max_tokens=40, stop_token_ids=ends)
    (late,) = tokens(engine, PROMPTS[:1], max_tokens=40, stop_token_ids=ends, min_tokens=20)
    beside = [Request("plain", tuple(PROMPTS[0]), params(max_tokens=40))]
    beside.append(Request("late", tuple(PROMPTS[0]), params(max_tokens=40, stop_token_ids=ends, min_tokens=20)))
    together = {name: [t for o in news for t in o.token_ids] for name, news in run(engine, beside).items()}
    assert stopped == free[:1]
    assert len(late) >= 20
    assert not {*late[:20]} & {*ends}
    assert together == {"plain": free, "late": late}


@pytest.mark.parametrize("name", ["llama", "qwen1-long"])
def test_prompt_logprobs_are_those_of_the_reference(name: str) -> None:
    with np.load(GOLDENS / name / "reference.npz") as reference:
        ids = reference["input_ids"][1].tolist()
        logits = reference["logits_none"][1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    with running(name) as whole, running(name, chunked_prefill_size=4) as pieces:
        for each in (whole, pieces):
            asked = params(max_tokens=0, prompt_logprobs=3)
            (output,) = run(each, [Request("scored", tuple(ids), asked)])["scored"]
            assert (output.finish_reason, output.token_ids) == (FinishReason.LENGTH, ())
            first, *rest = output.prompt_logprobs
            assert first is None
            assert [entry.token_id for entry in rest if entry] == ids[1:]
            for row, entry in zip(expected, rest, strict=False):
                assert entry is not None
                np.testing.assert_allclose(entry.logprob, row[entry.token_id], atol=1e-4)
                np.testing.assert_allclose([value for _, value in entry.top], np.sort(row)[:-4:-1], atol=1e-4)


def test_logprobs_of_new_tokens_are_those_of_scoring_them(engine: LocalEngine) -> None:
    request = Request("new", tuple(PROMPTS[0]), params(max_tokens=8, logprobs=2))
    new = [entry for output in run(engine, [request])["new"] for entry in output.logprobs]
    text = (*PROMPTS[0], *(entry.token_id for entry in new))
    (scored,) = run(engine, [Request("all", text, params(max_tokens=0, prompt_logprobs=2))])["all"]
    for entry, again in zip(new, scored.prompt_logprobs[-8:], strict=True):
        assert again is not None
        assert [token for token, _ in entry.top] == [token for token, _ in again.top]
        np.testing.assert_allclose(entry.logprob, again.logprob, atol=1e-5)
        assert entry.top[0] == (entry.token_id, entry.logprob)  # greedy


def test_nothing_asked_is_answered_at_once(engine: LocalEngine) -> None:
    (output,) = run(engine, [Request("none", (5, 6), params(max_tokens=0))])["none"]
    assert (output.finish_reason, output.token_ids, output.prompt_logprobs) == (FinishReason.LENGTH, (), ())


def test_a_seed_repeats_whatever_else_runs(engine: LocalEngine) -> None:
    hot = {"temperature": 1.0, "seed": 7}
    alone = tokens(engine, PROMPTS[:1], **hot)[0]
    assert tokens(engine, PROMPTS, **hot)[0] == alone
    assert tokens(engine, PROMPTS[:1], temperature=1.0, seed=8)[0] != alone
    assert tokens(engine, PROMPTS[:1], temperature=1.0)[0] != tokens(engine, PROMPTS[:1], temperature=1.0)[0]


def test_an_abort_frees_everything_and_is_not_heard_of_again(engine: LocalEngine) -> None:
    news: queue.SimpleQueue[Output] = queue.SimpleQueue()
    engine.submit(Request("long", (5, 6, 7), params(max_tokens=480)), news.put)
    news.get(timeout=60)
    engine.abort("long")
    engine.abort("never heard of")
    tokens(engine, PROMPTS[:1])  # commands are taken in order: the abort is through
    while not news.empty():
        assert news.get().finish_reason is None
    assert idle(engine)


@pytest.mark.parametrize(
    ("prompt", "change", "kind", "message"),
    [
        ((), {}, RequestError, "empty"),
        ((5, 512), {}, RequestError, "token id 512"),
        ((-1,), {}, RequestError, "token id -1"),
        ((5,), {"logprobs": 21}, RequestError, "up to 20"),
        ((5,), {"prompt_logprobs": -1}, RequestError, "up to 20"),
        ((5,), {"max_tokens": 512}, RequestTooLongError, "512"),
        ((5,), {"stop": ("x",)}, RequestError, "no tokenizer"),
    ],
)
def test_what_cannot_run_is_refused(
    engine: LocalEngine, prompt: tuple[int, ...], change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        engine.submit(Request("bad", prompt, params(**change)), lambda output: None)
    assert idle(engine)


def test_one_request_too_many_is_refused() -> None:
    with running(max_running_requests=1, max_queued_requests=1) as engine:
        news: queue.SimpleQueue[Output] = queue.SimpleQueue()
        for number in range(2):
            engine.submit(Request(str(number), (5, 6), params(max_tokens=480)), news.put)
            if number == 0:
                news.get(timeout=60)  # it runs, the second will wait
        with pytest.raises(QueueFullError, match="waiting"):
            engine.submit(Request("2", (5, 6), params()), news.put)
        with pytest.raises(RequestError, match="running already"):
            engine.submit(Request("0", (5, 6), params()), news.put)


def test_open_requests_cost_no_threads() -> None:
    with running(max_queued_requests=64) as engine:
        before = threading.enumerate()
        news: queue.SimpleQueue[Output] = queue.SimpleQueue()
        for number in range(64):
            engine.submit(Request(str(number), (5, 6), params(max_tokens=40)), news.put)
        assert threading.enumerate() == before
        left = 64
        while left:
            left -= news.get(timeout=60).finish_reason is not None
        assert threading.enumerate() == before


def test_submitting_does_not_wait_for_the_engine() -> None:
    with running() as engine:
        may_read = threading.Event()
        heard: queue.SimpleQueue[Output] = queue.SimpleQueue()

        def hear(output: Output) -> None:
            heard.put(output)
            may_read.wait(60)  # holds up the engine's thread

        engine.submit(Request("a", (5, 6), params(max_tokens=2)), hear)
        heard.get(timeout=60)
        engine.submit(Request("b", (5, 6), params(max_tokens=2)), hear)
        engine.abort("b")
        engine.submit(Request("b", (5, 6), params(max_tokens=1)), hear)
        may_read.set()
        assert [(heard.get(timeout=60).request_id) for _ in range(2)] == ["a", "b"]


@dataclass(frozen=True)
class Watched(Dispatched):
    """A step that says when it is read."""

    number: int
    events: list[tuple[str, int]]

    def read(self) -> StepResult:
        self.events.append(("read", self.number))
        return super().read()


def test_the_device_never_waits_for_the_host() -> None:
    """Each step is dispatched before the one before it is read, so the device has the next when it ends one."""
    events: list[tuple[str, int]] = []
    with running(chunked_prefill_size=32) as engine:
        dispatch = engine._executor.dispatch

        def watched(step: Step) -> Dispatched:
            number = sum(kind == "dispatch" for kind, _ in events)
            events.append(("dispatch", number))
            return Watched(**vars(dispatch(step)), number=number, events=events)

        engine._executor.dispatch = watched  # type: ignore[method-assign]
        assert len(tokens(engine, PROMPTS[:1], max_tokens=6)[0]) == 6
    ahead = [event for number in range(5) for event in (("dispatch", number + 1), ("read", number))]
    assert events == [("dispatch", 0), *ahead, ("read", 5)]


def test_a_request_taken_while_the_engine_stops_is_told_its_end() -> None:
    with running() as engine:
        ends: list[Output] = []
        taken = 0

        def ask() -> None:
            nonlocal taken
            with contextlib.suppress(EngineStoppedError):
                while True:
                    with contextlib.suppress(QueueFullError):
                        engine.submit(Request(f"r{taken}", (5, 6), params(max_tokens=2)), hear)
                        taken += 1

        def hear(output: Output) -> None:
            if output.finish_reason is not None:
                ends.append(output)

        thread = threading.Thread(target=ask)
        thread.start()
        while len(ends) < 5:
            time.sleep(0.01)
        engine.stop()
        thread.join(60)
        assert not thread.is_alive()
        assert taken == len(ends)
        assert engine._open == {}


def test_a_failed_step_ends_every_request_with_the_reason() -> None:
    with running() as engine:
        engine._executor._weights = ()  # the next step cannot run
        (output,) = run(engine, [Request("unlucky", (5, 6), params())])["unlucky"]
        assert output.finish_reason is FinishReason.ERROR
        assert engine.failure is not None
        assert output.error == engine.failure
        assert not engine.is_ready
        with pytest.raises(EngineStoppedError, match="TypeError"):
            engine.submit(Request("late", (5, 6), params()), lambda output: None)


@pytest.mark.parametrize(("seconds", "reason"), [(60.0, FinishReason.LENGTH), (0.0, FinishReason.ABORT)])
def test_stopping_lets_requests_end_for_a_while(seconds: float, reason: FinishReason) -> None:
    with running() as engine:
        news: queue.SimpleQueue[Output] = queue.SimpleQueue()
        engine.submit(Request("last", (5, 6), params(max_tokens=480)), news.put)
        assert news.get(timeout=60).finish_reason is None
        engine.stop(seconds)
        outputs = [news.get() for _ in range(news.qsize())]
        assert outputs[-1].finish_reason is reason
        with pytest.raises(EngineStoppedError, match="shutting down"):
            engine.submit(Request("late", (5, 6), params()), news.put)


def test_a_callers_fault_ends_its_own_request_only(engine: LocalEngine) -> None:
    def fail(output: Output) -> None:
        raise RuntimeError("the caller's fault")

    engine.submit(Request("faulty", (5, 6), params(max_tokens=100)), fail)
    assert len(tokens(engine, PROMPTS[:1])[0]) == 24
    assert idle(engine)
    assert engine.failure is None
