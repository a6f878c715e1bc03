"""A model in this process: prompts together and in pieces, refusals, and what is left when it is closed."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import podquant
from podquant.engine.request import SamplingParams
from podquant.errors import EngineStoppedError, RequestError, RequestTooLongError

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_idle(engine: podquant.Engine) -> bool:
    stats = engine._open().stats()
    return stats.num_running == stats.num_waiting == 0


def test_a_list_larger_than_the_queue_comes_back_in_its_order(engine: podquant.Engine) -> None:
    prompts = [[5 + number] * (1 + number % 3) for number in range(9)]
    together = engine.complete(prompts, GREEDY)
    alone = [engine.complete([prompt], GREEDY)[0] for prompt in prompts]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert len({output.token_ids for output in alone}) > 1


def test_keywords_replace_fields(engine: podquant.Engine) -> None:
    (output,) = engine.complete([[5]], GREEDY, max_tokens=2)
    assert len(output.token_ids) == 2
    misspelt: Any = {"max_token": 2}
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_token'"):
        engine.complete([[5]], GREEDY, **misspelt)


@pytest.mark.parametrize(
    ("prompts", "more", "message"),
    [
        ([[5], []], {}, "prompt: expected at least one token"),
        ([[5], [512]], {}, "token id 512"),
        ([[5]], {"temperature": -1.0}, "temperature: expected 0 to 100, got -1.0"),
        ([[5]], {"stop": "b"}, "stop: expected a tuple of strings, got 'b'"),
        ([[5]], {"logprobs": 21}, "21 log-probabilities"),
    ],
)
def test_a_refused_prompt_ends_its_call(
    engine: podquant.Engine, prompts: list[list[int]], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        engine.complete(prompts, GREEDY, **more)
    wait_until(lambda: is_idle(engine))


def test_a_prompt_that_is_too_long(engine: podquant.Engine) -> None:
    with pytest.raises(RequestTooLongError):
        engine.generate("word " * 600, max_tokens=1)


def test_a_text_is_no_list_of_prompts(engine: podquant.Engine) -> None:
    with pytest.raises(TypeError, match="expected a list of prompts, got a text"):
        engine.complete("Once upon a time")


def test_to_stop_iterating_ends_the_generation(engine: podquant.Engine) -> None:
    pieces = engine.stream([5, 6], GREEDY, max_tokens=500)
    next(pieces)
    assert not is_idle(engine)
    pieces.close()  # type: ignore[attr-defined]
    wait_until(lambda: is_idle(engine))


def test_what_is_wrong_with_a_stream_is_said_at_once(engine: podquant.Engine) -> None:
    with pytest.raises(RequestError, match="top_p"):
        engine.stream("Once", top_p=2.0)


def test_threads_share_an_engine(engine: podquant.Engine) -> None:
    alone = engine.generate("Once", GREEDY)
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(engine.generate("Once", GREEDY))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [alone] * 3


def test_closing_ends_what_runs_and_lets_go_of_the_devices(artifact: Path) -> None:
    gc.collect()
    before = len(jax.live_arrays())
    options = podquant.EngineOptions(str(artifact), device="cpu", max_running_requests=1, skip_server_warmup=True)
    with podquant.load(options, random_seed=3) as engine:
        assert len(jax.live_arrays()) > before
        pieces = engine.stream([5, 6], GREEDY, max_tokens=500)
        next(pieces)
    with pytest.raises(EngineStoppedError, match="before its time: the server is shutting down"):
        list(pieces)
    with pytest.raises(EngineStoppedError, match="The engine is closed"):
        engine.generate("Once")
    engine.close()
    del pieces
    gc.collect()
    assert len(jax.live_arrays()) <= before  # other tests' may have gone in the meantime


def test_without_a_tokenizer_only_token_ids_are_taken(artifact: Path) -> None:
    options = podquant.EngineOptions(str(artifact), device="cpu", skip_tokenizer_init=True, skip_server_warmup=True)
    with podquant.load(options) as engine:
        assert engine.tokenizer is None
        for ask in (engine.generate, engine.stream):
            with pytest.raises(RequestError, match="loaded without a tokenizer"):
                ask("Once")
