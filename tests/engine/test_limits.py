"""What is refused before it runs, and with which words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from podquant.engine.limits import Limits
from podquant.engine.request import Request, SamplingParams
from podquant.errors import QueueFullError, RequestError, RequestTooLongError

LIMITS = Limits(
    vocab_size=100,
    context_length=32,
    cache_tokens=1000,
    max_running=2,
    max_waiting=3,
    max_logprobs=5,
    has_tokenizer=True,
)


def request(num_prompt: int, **params: Any) -> Request:
    return Request("r", tuple(range(num_prompt)), SamplingParams(**params))


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens"),
    [(31, 1), (1, 31), (32, 0)],
)
def test_what_just_fits_the_context_is_taken(num_prompt: int, max_tokens: int) -> None:
    LIMITS.check(request(num_prompt, max_tokens=max_tokens))


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "param"), [(10, 23, "max_tokens"), (31, 2, "max_tokens"), (32, 1, "prompt")]
)
def test_what_exceeds_the_context_is_refused_in_the_words_that_clients_look_for(
    num_prompt: int, max_tokens: int, param: str
) -> None:
    with pytest.raises(RequestTooLongError) as raised:
        LIMITS.check(request(num_prompt, max_tokens=max_tokens))
    assert str(raised.value) == (
        f"This model's maximum context length is 32 tokens. However, you requested {num_prompt + max_tokens} tokens "
        f"({num_prompt} in the prompt, {max_tokens} in the completion). Please reduce the length of the prompt or "
        "completion."
    )
    assert raised.value.param == param


def test_a_chat_that_is_too_long_names_its_messages() -> None:
    with pytest.raises(
        RequestTooLongError, match=r"\(40 in the messages, 2 in the completion\).* messages or"
    ) as raised:
        LIMITS.check_length(40, 2, "messages")
    assert raised.value.param == "messages"


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "fits"), [(8, 9, True), (9, 9, False), (16, 0, True), (17, 0, False)]
)
def test_the_last_token_needs_no_room_in_the_cache(num_prompt: int, max_tokens: int, fits: bool) -> None:
    small = replace(LIMITS, cache_tokens=16)
    if fits:
        small.check(request(num_prompt, max_tokens=max_tokens))
        return
    with pytest.raises(RequestTooLongError, match="is 17 tokens on this server, whose KV cache holds no more"):
        small.check(request(num_prompt, max_tokens=max_tokens))


def test_room_is_what_the_smaller_of_context_and_cache_leaves() -> None:
    assert [LIMITS.room(num_prompt) for num_prompt in (1, 31, 32, 40)] == [31, 1, 0, -8]
    small = replace(LIMITS, cache_tokens=16)
    assert [small.room(num_prompt) for num_prompt in (1, 16, 17)] == [16, 1, 0]
    small.check(request(9, max_tokens=small.room(9)))


@pytest.mark.parametrize(
    ("prompt", "params", "message", "param"),
    [
        ((), {}, "The prompt is empty", "prompt"),
        ((5, 100), {}, "token id 100; this model's ids are 0 to 99", "prompt"),
        ((-1, 5), {}, "token id -1", "prompt"),
        ((5,), {"logprobs": 6}, "6 log-probabilities .* up to 5", "logprobs"),
        ((5,), {"prompt_logprobs": -1}, "up to 5", "logprobs"),
        ((5,), {"stop": ("a", "")}, "A `stop` string is empty", "stop"),
    ],
)
def test_what_the_model_does_not_have_is_refused(
    prompt: tuple[int, ...], params: dict[str, Any], message: str, param: str
) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        LIMITS.check(Request("r", prompt, SamplingParams(**params)))
    assert raised.value.param == param


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(RequestError, match="no tokenizer, so `stop` strings cannot be found") as raised:
        replace(LIMITS, has_tokenizer=False).check(request(1, stop=("END",)))
    assert raised.value.param == "stop"


def test_as_many_are_taken_as_may_run_and_wait() -> None:
    LIMITS.check_load(4)
    with pytest.raises(QueueFullError, match="5 requests are running or waiting, the most this server allows"):
        LIMITS.check_load(5)


def test_the_ends_of_every_range_are_taken() -> None:
    LIMITS.check(Request("r", (0, LIMITS.vocab_size - 1), SamplingParams(logprobs=0, prompt_logprobs=0)))
    LIMITS.check(Request("r", (1,), SamplingParams(logprobs=LIMITS.max_logprobs)))
