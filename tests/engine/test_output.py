from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from podquant.engine.output import OutputProcessor
from podquant.engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprobs
from podquant.tokenizer.tokenizer import Tokenizer

EOS = 2


def processor(tokenizer: Tokenizer | None, **params: Any) -> OutputProcessor:
    request = Request("r", (1,), SamplingParams(**{"max_tokens": 100, **params}))
    return OutputProcessor(request, tokenizer, frozenset([EOS]))


def run(tokenizer: Tokenizer, ids: list[int], **params: Any) -> list[Output]:
    """What a caller hears until the output ends."""
    follow = processor(tokenizer, **params)
    outputs = [follow.append(token) for token in ids]
    return [output for output in outputs if output is not None]


def characters(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token a byte, whatever merges the tokenizer has."""
    return [token for character in text for token in tokenizer.encode(character)]


def text_of(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


def test_an_end_token_ends_the_output_without_its_text(byte_level_tokenizer: Tokenizer) -> None:
    outputs = run(byte_level_tokenizer, [*characters(byte_level_tokenizer, "ab"), EOS, 50])
    assert text_of(outputs) == "ab"
    assert outputs[-1] == Output("r", (EOS,), finish_reason=FinishReason.STOP)
    assert [output.finish_reason for output in outputs[:-1]] == [None, None]


def test_an_end_token_can_be_ignored(byte_level_tokenizer: Tokenizer) -> None:
    ids = [*characters(byte_level_tokenizer, "a"), EOS, *characters(byte_level_tokenizer, "b")]
    outputs = run(byte_level_tokenizer, ids, ignore_eos=True, max_tokens=3)
    assert (text_of(outputs), outputs[-1].finish_reason) == ("ab", FinishReason.LENGTH)


def test_a_stop_token_is_named_and_its_text_left_out(byte_level_tokenizer: Tokenizer) -> None:
    a, b = characters(byte_level_tokenizer, "ab")
    outputs = run(byte_level_tokenizer, [a, b, a], stop_token_ids=(b,))
    assert outputs[-1] == Output("r", (b,), finish_reason=FinishReason.STOP, stop_reason=b)
    assert text_of(outputs) == "a"


def test_the_length_ends_the_output_with_all_its_text(byte_level_tokenizer: Tokenizer) -> None:
    ids = byte_level_tokenizer.encode("a😀")[:-1]
    outputs = run(byte_level_tokenizer, ids, max_tokens=len(ids), stop=("zzz",))
    assert outputs[-1].finish_reason == FinishReason.LENGTH
    assert text_of(outputs) == byte_level_tokenizer.decode(ids)


def test_what_may_begin_a_stop_string_is_held_back(byte_level_tokenizer: Tokenizer) -> None:
    outputs = run(byte_level_tokenizer, characters(byte_level_tokenizer, "xENxENDy"), stop=("END",))
    assert [output.text for output in outputs] == ["x", "", "", "ENx", "", "", ""]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, "END")


def test_held_text_is_shown_when_the_output_ends_otherwise(byte_level_tokenizer: Tokenizer) -> None:
    ids = characters(byte_level_tokenizer, "xEN")
    assert text_of(run(byte_level_tokenizer, [*ids, EOS], stop=("END",))) == "xEN"
    assert text_of(run(byte_level_tokenizer, ids, stop=("END",), max_tokens=3)) == "xEN"


def test_the_first_of_several_stop_strings_counts(byte_level_tokenizer: Tokenizer) -> None:
    ids = byte_level_tokenizer.encode("hello world")
    outputs = run(byte_level_tokenizer, ids, stop=("world", "lo w", "zzz"))
    assert (text_of(outputs), outputs[-1].stop_reason) == ("hel", "lo w")


@pytest.mark.parametrize(
    ("text", "params", "shown", "reason"),
    [
        ("abcabc", {"stop": ("b",), "min_tokens": 4}, "abca", "b"),
        ("abcabc", {"stop": ("b",), "min_tokens": 2}, "a", "b"),
        # held back as the begin of "bcd", "b" itself is past when tokens may stop
        ("abxx", {"stop": ("b", "bcd"), "min_tokens": 3, "max_tokens": 4}, "abxx", None),
        ("abcd", {"stop": ("bc",), "min_tokens": 3}, "a", "bc"),
    ],
)
def test_no_stop_string_counts_before_min_tokens(
    byte_level_tokenizer: Tokenizer, text: str, params: dict[str, Any], shown: str, reason: str | None
) -> None:
    outputs = run(byte_level_tokenizer, characters(byte_level_tokenizer, text), **params)
    assert (text_of(outputs), outputs[-1].stop_reason) == (shown, reason)


def test_a_stop_string_let_pass_is_shown_at_once(byte_level_tokenizer: Tokenizer) -> None:
    outputs = run(byte_level_tokenizer, characters(byte_level_tokenizer, "abx"), stop=("ab", "zzzz"), min_tokens=3)
    assert [output.text for output in outputs] == ["", "ab", "x"]


def test_no_token_ends_the_output_before_min_tokens(byte_level_tokenizer: Tokenizer) -> None:
    (a,) = characters(byte_level_tokenizer, "a")
    outputs = run(byte_level_tokenizer, [a, EOS, a, EOS, a], min_tokens=3)
    assert [token for output in outputs for token in output.token_ids] == [a, EOS, a, EOS]
    assert text_of(outputs) == "aa"


def first_stop(text: str, stops: tuple[str, ...]) -> str:
    """What precedes the stop string that is complete first; of several complete then, the one that begins first."""
    for end in range(1, len(text) + 1):
        positions = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if positions:
            return text[: min(positions)]
    return text


@settings(max_examples=400, deadline=None)
@given(
    text=st.text(alphabet="abé", max_size=24),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3).map(tuple),
)
@example(text="aab", stops=("ab", "aab"))
@example(text="ababab", stops=("abb", "b"))
def test_shown_text_never_reaches_into_a_stop_string(
    byte_level_tokenizer: Tokenizer, text: str, stops: tuple[str, ...]
) -> None:
    ids = characters(byte_level_tokenizer, text)
    outputs = run(byte_level_tokenizer, [*ids, EOS], stop=stops)
    assert text_of(outputs) == first_stop(text, stops)
    assert outputs[-1].finish_reason == FinishReason.STOP
    shown = ""
    for output in outputs:
        shown += output.text
        assert not any(stop in shown for stop in stops)


def test_nothing_is_heard_after_the_end(byte_level_tokenizer: Tokenizer) -> None:
    follow = processor(byte_level_tokenizer, stop=("END",))
    for token in characters(byte_level_tokenizer, "xE"):
        follow.append(token)
    assert follow.finish(FinishReason.ABORT) == Output("r", text="E", finish_reason=FinishReason.ABORT)
    assert follow.append(50) is None
    assert follow.finish(FinishReason.ERROR) is None


def test_an_error_is_passed_on() -> None:
    output = processor(None).finish(FinishReason.ERROR, "a host was lost")
    assert output == Output("r", finish_reason=FinishReason.ERROR, error="a host was lost")


def test_log_probabilities_come_with_their_tokens(byte_level_tokenizer: Tokenizer) -> None:
    follow = processor(byte_level_tokenizer)
    prompt, first = TokenLogprobs(7, -0.5), TokenLogprobs(50, -1.5, ((50, -1.5),))
    follow.add_prompt_logprobs((None,))
    follow.add_prompt_logprobs((prompt,))
    news = [follow.append(50, first), follow.append(51)]
    assert [output.prompt_logprobs for output in news if output] == [(None, prompt), ()]
    assert [output.logprobs for output in news if output] == [(first,), ()]


def test_without_a_tokenizer_there_are_tokens_only() -> None:
    follow = processor(None, max_tokens=2)
    assert follow.append(50) == Output("r", (50,))
    assert follow.append(51) == Output("r", (51,), finish_reason=FinishReason.LENGTH)
