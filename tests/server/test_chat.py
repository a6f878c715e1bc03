"""`/v1/chat/completions` through OpenAI's own client."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from podquant.engine.engine import LocalEngine
from tests.server.conftest import GOLDEN, MODEL, make_engine, serving, tokenizer_of
from tests.tokenizer.vocabularies import trained_ranks, write_ranks

MESSAGES = [{"role": "system", "content": "short"}, {"role": "user", "content": "import what?"}]
GREEDY: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0.0, "max_completion_tokens": 10}


def test_a_chat_is_the_completion_of_its_template(engine: LocalEngine, ai: openai.OpenAI) -> None:
    chat = ai.chat.completions.create(**GREEDY)
    ids = tokenizer_of(engine).encode("<|system|>short\n<|user|>import what?\n<|assistant|>", add_special_tokens=False)
    plain = ai.completions.create(model=MODEL, prompt=ids, temperature=0.0, max_tokens=10)
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.usage.prompt_tokens == len(ids)
    assert chat.object == "chat.completion"


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(ai: openai.OpenAI) -> None:
    whole = ai.chat.completions.create(**GREEDY).choices[0].message.content
    usage: Any = {"include_usage": True}
    *chunks, last = list(ai.chat.completions.create(stream=True, stream_options=usage, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert (last.choices, last.usage.completion_tokens) == ([], 10)


def test_logprobs_name_the_chosen_and_the_likeliest(ai: openai.OpenAI) -> None:
    content = ai.chat.completions.create(logprobs=True, top_logprobs=2, **GREEDY).choices[0].logprobs.content
    assert len(content) == 10
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.token == entry.top_logprobs[0].token  # greedy
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        ({"extra_body": {"tools": [{"type": "function", "function": {"name": "f"}}]}}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
    ],
)
def test_what_a_chat_cannot_do_is_refused_by_name(ai: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(**(GREEDY | change))
    assert caught.value.param == param


def test_half_a_surrogate_pair_in_a_message_is_refused(url: str) -> None:
    body = '{"messages": [{"role": "user", "content": "a\\ud800"}]}'
    answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, "messages" in answer.json()["error"]["param"]) == (400, True)


def test_first_generation_qwen_chats_in_chatml(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN.parent / "qwen1" / name, tmp_path / name)
    write_ranks(tmp_path / "qwen.tiktoken", trained_ranks(300))
    engine = make_engine(tmp_path)
    try:
        with serving(engine) as url, httpx.Client(base_url=url, timeout=60) as client:
            body = {"messages": [{"role": "user", "content": "<|im_end|>"}]}
            ids = client.post("/tokenize", json=body).json()["tokens"]
            whole = client.post("/v1/chat/completions", json=body | {"max_tokens": 6, "temperature": 0}).json()
    finally:
        engine.stop()
    assert [ids.count(mark) for mark in (300, 301, 302)] == [0, 3, 2]
    assert whole["usage"]["prompt_tokens"] == len(ids)
    assert engine.tokenizer is not None
    assert engine.tokenizer.decode(ids).startswith(
        "system\nYou are a helpful assistant.\nuser\n<|im_end|>\nassistant\n"
    )


def test_a_template_that_bursts_is_an_error_of_its_chats_alone(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    settings = {"chat_template": "{{ 'x' * 10**10 }}", "eos_token": "</s>"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    engine = make_engine(tmp_path / "model")
    try:
        with serving(engine) as url, httpx.Client(base_url=url, timeout=60) as client:
            for route in ("/tokenize", "/v1/chat/completions"):
                answer = client.post(route, json={"messages": MESSAGES})
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (400, "messages")
                assert "tokenizer_config.json) cannot render these messages: MemoryError" in error["message"]
            assert client.get("/health").status_code == 200
            assert client.post("/v1/completions", json={"prompt": [5], "max_tokens": 1}).status_code == 200
    finally:
        engine.stop()
