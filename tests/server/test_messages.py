"""What the messages of a chat may hold, and what the chat template sees of them, through the real app."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from podquant.engine.engine import LocalEngine
from podquant.server.messages import Message

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, null]}'}}
USER = {"role": "user", "content": "hi"}


def rendered(engine: LocalEngine, client: httpx.Client, *messages: dict[str, Any]) -> str:
    answer = client.post("/tokenize", json={"messages": messages})
    assert answer.status_code == 200, answer.text
    assert engine.tokenizer is not None
    return engine.tokenizer.decode(answer.json()["tokens"], skip_special_tokens=False)


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_parts_of_text_are_joined(engine: LocalEngine, client: httpx.Client, role: str) -> None:
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}}]
    whole = rendered(engine, client, {"role": role, "content": "one, two"})
    shown = "system" if role == "developer" else role  # this template knows nothing of developers
    assert rendered(engine, client, {"role": role, "content": parts}) == whole == f"<|{shown}|>one, two\n<|assistant|>"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "assistant", "content": []},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        # as OpenAI's client writes a message of an answer
        {"role": "assistant", "content": "", "refusal": None, "annotations": [], "tool_calls": [], "audio": None},
    ],
)
def test_an_assistant_may_have_said_nothing(engine: LocalEngine, client: httpx.Client, message: dict[str, Any]) -> None:
    assert rendered(engine, client, message) == "<|assistant|>\n<|assistant|>"


def test_the_answer_of_a_tool_follows_its_call(client: httpx.Client) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    messages = [USER, called, {"role": "tool", "tool_call_id": "1", "content": "2"}]
    answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ('{"x": [1, null]}', {"x": [1, None]}),
        ({"y": None}, {"y": None}),
        ("", {}),
        ('{"cut off": ', '{"cut off": '),
        ("[1]", "[1]"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_a_template_sees_arguments_as_the_object_they_are(arguments: object, seen: object) -> None:
    sent = {"role": "assistant", "name": "it", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert Message.model_validate(sent).as_template_sees_it() == {
        "role": "assistant",
        "content": "",
        "name": "it",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": seen}}],
    }


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "content.0", "'image_url'"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "content.0", "'input_audio'"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "file"}]}, "content.1", "'file'"),
        ({"role": "user", "content": ["a"]}, "content.0", "object with a type"),
        ({"role": "user", "content": [{"type": "text"}]}, "content.0.text", "expected a text"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "txt": 1}]}, "content.0.txt", "no 'txt'"),
        ({"role": "user", "content": 5}, "content", "got 5"),
        ({"role": "user", "content": None}, "content", "no content"),
        ({"role": "tool", "tool_call_id": "1"}, "content", "no content"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "tool_calls", "only an assistant's"),
        ({"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}, "tool_calls.0.type", "function"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "function_call", "not supported"),
        ({"role": "assistant", "audio": {"id": "1"}}, "audio", "not supported"),
        ({"role": "function", "content": "a"}, "role", "system"),
        ({"role": "user", "content": "a", "nmae": "b"}, "nmae", "Unknown"),
    ],
)
def test_what_a_message_cannot_hold_is_refused_by_name(
    client: httpx.Client, message: dict[str, Any], param: str, words: str
) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": [USER, message]})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == f"messages.1.{param}"
    assert words in error["message"]
