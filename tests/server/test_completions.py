"""`/v1/completions` through OpenAI's own client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from podquant.engine.engine import LocalEngine
from tests.server.conftest import GOLDEN, MODEL, make_engine, serving, tokenizer_of

PROMPT = "from typing import Any"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0.0, "max_tokens": 12}


def test_greedy_is_the_same_whole_streamed_and_as_token_ids(engine: LocalEngine, ai: openai.OpenAI) -> None:
    whole = ai.completions.create(prompt=PROMPT, **GREEDY)
    (choice,) = whole.choices
    assert choice.finish_reason == "length"
    ids = tokenizer_of(engine).encode(PROMPT)
    assert (whole.object, whole.model) == ("text_completion", MODEL)
    assert whole.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(ids), "completion_tokens": 12, "total_tokens": len(ids) + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    chunks = list(ai.completions.create(prompt=PROMPT, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert ai.completions.create(prompt=ids, **GREEDY).choices[0].text == choice.text


def cached(usage: Any) -> int:
    assert usage.prompt_tokens_details is not None
    return int(usage.prompt_tokens_details.cached_tokens)


def test_tokens_that_were_cached_are_told_and_isolated_by_salt(engine: LocalEngine, ai: openai.OpenAI) -> None:
    ids = [(7 * i + 3) % 90 + 5 for i in range(40)]  # two pages of 16, and a part of one
    before = engine.stats().num_cached_tokens

    def ask(salt: str | None, **more: Any) -> Any:
        return ai.completions.create(prompt=ids, **GREEDY, extra_body={"cache_salt": salt}, **more)

    first, second, mine, mine_again = ask(None), ask(None), ask("mine"), ask("mine")
    assert [cached(each.usage) for each in (first, second, mine, mine_again)] == [0, 32, 0, 32]
    assert {each.choices[0].text for each in (first, second, mine, mine_again)} == {first.choices[0].text}
    *_, last = ask("yours", n=2, stream=True, stream_options={"include_usage": True})
    assert cached(last.usage) == 0  # of a prompt that is sent once, although its second choice shares it
    *_, last = ask("yours", stream=True, stream_options={"include_usage": True})
    assert cached(last.usage) == 32
    assert engine.stats().num_cached_tokens == before + 4 * 32


def test_token_ids_come_back_and_decode_to_the_text(engine: LocalEngine, ai: openai.OpenAI) -> None:
    more: dict[str, Any] = {"prompt": PROMPT, "extra_body": {"return_token_ids": True}, **GREEDY}
    choice = ai.completions.create(**more).choices[0]
    assert choice.prompt_token_ids == tokenizer_of(engine).encode(PROMPT)
    assert len(choice.token_ids) == 12
    assert tokenizer_of(engine).decode(choice.token_ids) == choice.text
    pieces = [chunk.choices[0] for chunk in ai.completions.create(stream=True, **more)]
    assert [token for piece in pieces for token in piece.token_ids] == choice.token_ids
    assert pieces[0].prompt_token_ids == choice.prompt_token_ids
    assert not hasattr(pieces[1], "prompt_token_ids")


def test_several_prompts_times_n_come_in_order(engine: LocalEngine, ai: openai.OpenAI) -> None:
    prompts = [PROMPT, "class", "def __init__"]
    single = [ai.completions.create(prompt=prompt, **GREEDY).choices[0].text for prompt in prompts]
    many = ai.completions.create(prompt=prompts, **GREEDY)
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert [choice.text for choice in many.choices] == single
    ids = [tokenizer_of(engine).encode(prompt) for prompt in prompts[:2]]
    twice = ai.completions.create(prompt=ids, n=2, **GREEDY)
    assert [choice.text for choice in twice.choices] == [single[0]] * 2 + [single[1]] * 2
    assert twice.usage.prompt_tokens == sum(map(len, ids))
    assert twice.usage.completion_tokens == 48


def test_a_seed_repeats_and_choices_differ(ai: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 16, "temperature": 1.0, "n": 2}
    first, again = (ai.completions.create(seed=7, **ask).choices for _ in range(2))
    assert [choice.text for choice in first] == [choice.text for choice in again]
    assert first[0].text != first[1].text
    assert ai.completions.create(seed=-(2**63), **ask).choices[0].text != first[0].text


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}])
def test_each_way_to_narrow_the_choice_to_one_is_greedy(ai: openai.OpenAI, narrow: dict[str, float]) -> None:
    greedy = ai.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    ask: dict[str, Any] = GREEDY | {"temperature": 1.0, "prompt": PROMPT}
    assert ai.completions.create(extra_body=narrow, **ask).choices[0].text == greedy


def test_usage_streams_last_and_only_if_asked_for(ai: openai.OpenAI) -> None:
    chunks = list(
        ai.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, n=2, **GREEDY)
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_stream_is_events_that_end_with_done(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/completions", json={"prompt": PROMPT, "stream": True, **GREEDY}) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = list(response.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: {") for line in lines[:-2:2])
    assert set(lines[1::2]) == {""}


def test_a_stop_string_ends_the_output_and_is_left_out(ai: openai.OpenAI) -> None:
    whole = ai.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    stop = whole[5:7]
    asked: list[dict[str, Any]] = [{"stop": stop}, {"stop": ["never to be found", stop]}]
    for more in asked:
        choice = ai.completions.create(prompt=PROMPT, **more, **GREEDY).choices[0]
        assert choice.text == whole[: whole.index(stop)]
        assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    chunks = list(ai.completions.create(prompt=PROMPT, stop=stop, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]


def test_stop_tokens_and_min_tokens(ai: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    ids = ai.completions.create(prompt=PROMPT, extra_body=extra, **GREEDY).choices[0].token_ids
    stop = {"stop_token_ids": [ids[3]]} | extra
    choice = ai.completions.create(prompt=PROMPT, extra_body=stop, **GREEDY).choices[0]
    first = ids.index(ids[3]) + 1
    assert choice.token_ids == ids[:first]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", ids[3])
    late = ai.completions.create(prompt=PROMPT, extra_body=stop | {"min_tokens": 12}, **GREEDY).choices[0].token_ids
    assert late[: first - 1] == ids[: first - 1]
    assert len(late) == 12
    assert ids[3] not in late


def test_penalties_change_what_was_said_already(ai: openai.OpenAI) -> None:
    ask = GREEDY | {"prompt": PROMPT, "max_tokens": 40}
    extra = {"return_token_ids": True}
    plain = ai.completions.create(extra_body=extra, **ask).choices[0].token_ids
    said = [
        ai.completions.create(extra_body=extra, presence_penalty=2.0, **ask).choices[0].token_ids,
        ai.completions.create(extra_body=extra, frequency_penalty=2.0, **ask).choices[0].token_ids,
        ai.completions.create(extra_body=extra | {"repetition_penalty": 2.0}, **ask).choices[0].token_ids,
    ]
    assert all(len({*ids}) > len({*plain}) for ids in said)
    forms = [
        ai.completions.create(extra_body=extra | {"repetition_penalty": 1.0}, presence_penalty=0.0, **ask),
        ai.completions.create(extra_body=extra, frequency_penalty=0.0, **ask),
    ]
    assert all(form.choices[0].token_ids == plain for form in forms)


def test_logprobs_are_openais_lists(ai: openai.OpenAI) -> None:
    choice = ai.completions.create(prompt=PROMPT, logprobs=3, **GREEDY).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 12
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert logprob == max(top.values()) == top[token]  # greedy
        assert list(top.values()) == sorted(top.values(), reverse=True)
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    pieces = [chunk.choices[0] for chunk in ai.completions.create(prompt=PROMPT, logprobs=3, stream=True, **GREEDY)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for piece in pieces for one in getattr(piece.logprobs, name)] == getattr(logprobs, name)
    only_chosen = ai.completions.create(prompt=PROMPT, logprobs=0, **GREEDY).choices[0].logprobs
    assert [list(top) for top in only_chosen.top_logprobs] == [[token] for token in only_chosen.tokens]


def test_echo_gives_the_prompt_and_its_logprobs(engine: LocalEngine, ai: openai.OpenAI) -> None:
    whole = ai.completions.create(prompt=PROMPT, **GREEDY).choices[0]
    echoed = ai.completions.create(prompt=PROMPT, echo=True, **GREEDY).choices[0]
    assert echoed.text == PROMPT + whole.text
    assert echoed.logprobs is None
    scored = ai.completions.create(prompt=PROMPT, echo=True, logprobs=2, **GREEDY).choices[0]
    ids = tokenizer_of(engine).encode(PROMPT)
    assert scored.text == PROMPT + whole.text
    assert scored.logprobs.token_logprobs[0] is None
    assert scored.logprobs.top_logprobs[0] is None
    assert len(scored.logprobs.tokens) == len(ids) + 12
    ends = [*scored.logprobs.text_offset[1 : len(ids)], len(PROMPT)]
    slices = [PROMPT[start:end] for start, end in zip(scored.logprobs.text_offset, ends, strict=False)]
    assert slices == scored.logprobs.tokens[: len(ids)]
    chunks = list(ai.completions.create(prompt=PROMPT, echo=True, logprobs=2, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == scored.text
    assert chunks[0].choices[0].logprobs.token_logprobs[: len(ids)] == scored.logprobs.token_logprobs[: len(ids)]


def test_echo_of_no_new_tokens_scores_the_prompt_as_the_reference_does(ai: openai.OpenAI) -> None:
    with np.load(GOLDEN / "reference.npz") as reference:
        ids = reference["input_ids"][0].tolist()
        logits = reference["logits_none"][0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ask: dict[str, Any] = {"model": MODEL, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
    choice = ai.completions.create(**ask).choices[0]
    assert (choice.finish_reason, choice.text) == ("length", ai_text(ai, ids))
    expected = [logprobs[i, token] for i, token in enumerate(ids[1:])]
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], expected, atol=2e-3)
    best = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
    np.testing.assert_allclose(best, logprobs.max(-1)[:-1], atol=2e-3)


def ai_text(ai: openai.OpenAI, ids: list[int]) -> str:
    return ai.completions.create(model=MODEL, prompt=ids, max_tokens=0, echo=True).choices[0].text


def test_without_a_tokenizer_token_ids_go_in_and_come_out(
    checkpoint: Path, engine: LocalEngine, ai: openai.OpenAI
) -> None:
    ids = tokenizer_of(engine).encode(PROMPT)
    extra = {"return_token_ids": True}
    expected = ai.completions.create(prompt=ids, extra_body=extra, **GREEDY).choices[0].token_ids
    bare = make_engine(checkpoint, skip_tokenizer_init=True)
    try:
        with serving(bare) as url, httpx.Client(base_url=url, timeout=60) as client:
            ask = {"prompt": ids, "logprobs": 1, "echo": True, **GREEDY}
            choice = client.post("/v1/completions", json=ask).json()["choices"][0]
            assert choice["text"] == ""
            assert choice["token_ids"] == expected
            assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in [*ids, *expected]]
            assert set(choice["logprobs"]["top_logprobs"][-1]) == {f"token_id:{expected[-1]}"}
            assert set(choice["logprobs"]["text_offset"]) == {0}
            with client.stream("POST", "/v1/completions", json={"prompt": ids, "stream": True, **GREEDY}) as response:
                text = "".join(response.iter_text())
            assert text.count('"token_ids":[') == 12
            refusals = {
                "/v1/completions": {"prompt": PROMPT},
                "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
                "/tokenize": {"prompt": "hello"},
                "/detokenize": {"tokens": [1]},
            }
            for route, body in refusals.items():
                refused = client.post(route, json=body)
                assert refused.status_code == 400
                assert "no tokenizer" in refused.json()["error"]["message"]
            refused = client.post("/v1/completions", json={"prompt": ids, "stop": "x"}).json()["error"]
            assert (refused["param"], "stop_token_ids" in refused["message"]) == ("stop", True)
    finally:
        bare.stop()


def test_many_at_once_get_what_each_would_get_alone(url: str, ai: openai.OpenAI) -> None:
    prompts = ["import", "from typing import", "class Tokenizer", "def encode", "return", "str"]
    alone = [ai.completions.create(prompt=prompt, **GREEDY).choices[0].text for prompt in prompts]

    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(prompt=prompt, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    assert asyncio.run(ask_all()) == alone
