"""Bodies up to the 16 MiB that one may have: refused at the first thing that is wrong, before much is made of them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi.exceptions import RequestValidationError

from podquant.engine.limits import Limits
from podquant.errors import RequestError
from podquant.server import bodies, schemas
from podquant.server.errors import ApiError
from podquant.server.fields import Body
from podquant.server.service import require_prompts_fit

JSON = {"content-type": "application/json"}
MILLIONS = (16 << 20) - 100
CHAT, COMPLETION, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"


def many(piece: str, number: int = MILLIONS) -> str:
    """A list of so many characters, of one value after another."""
    return "[" + ",".join([piece] * (number // (len(piece) + 1))) + "]"


USER = '{"role":"user","content":"hi"}'
CALL = '{"function":{"name":"f"}}'


@pytest.mark.parametrize(
    ("route", "body", "status", "message"),
    [
        (COMPLETION, '{"n":16,"prompt":' + many("1") + "}", 413, "more than 1048576 values"),
        (COMPLETION, '{"n":16,"prompt":' + many("1", 1 << 20) + "}", 400, "maximum context length is 512 tokens"),
        (COMPLETION, '{"prompt":' + many("[1]", 1 << 20) + "}", 400, "prompts, more than 128"),
        (COMPLETION, '{"prompt":' + many("1.5", 1 << 20) + "}", 400, "prompt"),
        (COMPLETION, '{"n":128,"prompt":"' + "a" * MILLIONS + '"}', 400, "maximum context length is 512 tokens"),
        (COMPLETION, '{"prompt":[5],"stop":' + many('"a"', 1 << 20) + "}", 400, "at most 64"),
        (COMPLETION, '{"prompt":[5],"stop":"' + "a" * (1 << 20) + '"}', 400, "at most 1024 characters"),
        (COMPLETION, '{"prompt":[5],"stop_token_ids":' + many('"a"', 1 << 20) + "}", 400, "stop_token_ids.0"),
        (COMPLETION, '{"prompt":[5],"model":"' + "a" * MILLIONS + '"}', 404, "There is no model 'aaa"),
        (COMPLETION, '{"prompt":[5],"' + "a" * MILLIONS + '":1}', 400, "Unknown parameter: 'aaa"),
        (COMPLETION, '{"prompt":[5],' + ",".join(f'"a{i}":1' for i in range(1 << 17)) + "}", 400, "parameter: 'a0'"),
        (COMPLETION, '{"prompt":[5],"temperature":' + "1" * MILLIONS + "}", 413, "more than 400 digits"),
        (COMPLETION, '{"prompt":[5],"metadata":' + "[" * 101 + "]" * 101 + "}", 413, "nested more than 100 deep"),
        (COMPLETION, "[" * MILLIONS, 413, "nested more than 100 deep"),
        (COMPLETION, "]" * (1 << 20), 400, "not valid JSON"),
        (COMPLETION, '"' * (1 << 20), 400, "not valid JSON"),
        (CHAT, '{"messages":' + many(USER) + "}", 413, "more than 131072 values"),
        (CHAT, '{"messages":' + many(USER, 1 << 20) + "}", 400, "at most 16384"),
        (CHAT, '{"messages":' + many("1", 1 << 17) + "}", 400, "messages"),
        (CHAT, '{"messages":' + many('{"role":1}', 1 << 17) + "}", 400, "messages.0.role"),
        (CHAT, '{"messages":[{"role":"user","content":' + many("1", 1 << 17) + "}]}", 400, "content.0"),
        (CHAT, '{"messages":[{"role":"assistant","tool_calls":' + many(CALL, 1 << 19) + "}]}", 400, "at most 1024"),
        (CHAT, '{"messages":[{"role":"user","content":"' + "a" * MILLIONS + '"}]}', 400, "maximum context length"),
        (TOKENIZE, '{"prompt":"' + "a b" * (MILLIONS // 3) + '"}', 400, "maximum context length"),
        (TOKENIZE, '{"messages":' + many(USER, 1 << 18) + "}", 400, "maximum context length"),
        (DETOKENIZE, '{"tokens":' + many("1") + "}", 413, "more than 1048576 values"),
        (DETOKENIZE, '{"tokens":' + many("1", 1 << 20) + "}", 400, "tokens are more than a prompt"),
        (DETOKENIZE, '{"tokens":' + many('"a"', 1 << 20) + "}", 400, "tokens.0"),
        (DETOKENIZE, '{"tokens":' + many("-1", 1 << 20) + "}", 400, "tokens.0"),
    ],
)
def test_a_huge_body_is_refused_in_a_few_words(
    client: httpx.Client, route: str, body: str, status: int, message: str
) -> None:
    answer = client.post(route, content=body, headers=JSON)
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text[:1000]
    assert len(answer.text) < 1000


def test_arguments_of_tools_are_bounded_with_the_body_they_are_in() -> None:
    calls = [{"function": {"name": "f", "arguments": json.dumps({"a": [0] * 1000})}}] * 1000
    body = {"messages": [{"role": "assistant", "tool_calls": calls}]}
    with pytest.raises(RequestValidationError) as caught:
        bodies.read(json.dumps(body).encode(), schemas.ChatBody, 512)
    (error,) = caught.value.errors()
    assert "together with the rest of the body" in error["msg"]


@pytest.mark.parametrize(("longest", "most"), [(4096, 1 << 20), (1 << 21, 1 << 21)])
def test_copies_of_a_long_prompt_count(longest: int, most: int) -> None:
    limits = Limits(context_length=longest, cache_tokens=longest)
    require_prompts_fit(most, limits)
    with pytest.raises(RequestError, match=f"a prompt counts n times.*may bring {most}"):
        require_prompts_fit(most + 1, limits)


def huge(kind: type[Body]) -> dict[str, Any]:
    """Every field of a body with a long list of what it is not."""
    return {name: [["wrong"]] * 1000 for name in kind.model_fields if name != "model"}


@pytest.mark.parametrize(
    "kind", [schemas.CompletionBody, schemas.ChatBody, schemas.TokenizeBody, schemas.DetokenizeBody]
)
def test_no_list_has_more_than_one_error(kind: type[Body]) -> None:
    with pytest.raises(RequestValidationError) as caught:
        bodies.read(json.dumps(huge(kind)).encode(), kind, 512)
    assert len(caught.value.errors()) <= len(kind.model_fields)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        ('{"prompt": "a"}'.encode("utf-16"), "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_json"),
    ],
)
def test_what_is_not_json_is_refused(text: bytes, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        bodies.read(text, schemas.CompletionBody, 512)
    assert (caught.value.status, caught.value.code) == (400, code)


@pytest.mark.parametrize("kind", [None, "text/plain", "multipart/form-data; boundary=x", "application/jsonp"])
def test_json_must_say_that_it_is(client: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = client.post(COMPLETION, content=b'{"prompt": [5], "max_tokens": 1}', headers=headers)
    assert (answer.status_code, "application/json" in answer.json()["error"]["message"]) == (400, True)
    kinds = ("application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON")
    for right in kinds:
        answer = client.post(COMPLETION, content=b'{"prompt": [5], "max_tokens": 1}', headers={"content-type": right})
        assert answer.status_code == 200
