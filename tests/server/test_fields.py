"""The table of fields against OpenAI's client, vLLM's list and the bodies, and each row through the real app."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types import chat as chat_types
from openai.types import completion_create_params as completion
from openai.types.chat import completion_create_params as chat
from openai.types.chat.chat_completion_message_function_tool_call_param import Function

from podquant.server.fields import FIELDS, Body, Field, Part, Treatment, fields_of
from podquant.server.messages import Function as FunctionBody
from podquant.server.messages import Message, ToolCall
from podquant.server.schemas import ChatBody, CompletionBody, DetokenizeBody, StreamOptions, TokenizeBody
from tests.server.conftest import MODEL

OPENAI = [
    (Part.COMPLETION, completion.CompletionCreateParamsStreaming),
    (Part.COMPLETION, completion.CompletionCreateParamsNonStreaming),
    (Part.CHAT, chat.CompletionCreateParamsStreaming),
    (Part.CHAT, chat.CompletionCreateParamsNonStreaming),
    (Part.STREAM_OPTIONS, chat_types.ChatCompletionStreamOptionsParam),
    (Part.MESSAGE, chat_types.ChatCompletionSystemMessageParam),
    (Part.MESSAGE, chat_types.ChatCompletionDeveloperMessageParam),
    (Part.MESSAGE, chat_types.ChatCompletionUserMessageParam),
    (Part.MESSAGE, chat_types.ChatCompletionAssistantMessageParam),
    (Part.MESSAGE, chat_types.ChatCompletionToolMessageParam),
    (Part.CONTENT, chat_types.ChatCompletionContentPartTextParam),
    (Part.CONTENT, chat_types.ChatCompletionContentPartRefusalParam),
    (Part.TOOL_CALL, chat_types.ChatCompletionMessageFunctionToolCallParam),
    (Part.FUNCTION, Function),
]

VLLM_BOTH = """
    model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream stream_options
    temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs logprob_token_ids bad_words
    add_special_tokens response_format structured_outputs priority request_id session_id return_tokens_as_token_ids
    return_token_ids routed_experts_prompt_start return_token_offsets return_mm_kwargs cache_salt kv_transfer_params
    ec_transfer_params vllm_xargs repetition_detection thinking_token_budget stream_interval echo
    guided_json guided_regex guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern
    logits_processors
"""
VLLM = {
    Part.COMPLETION: VLLM_BOTH + "prompt suffix prompt_embeds best_of",
    Part.CHAT: VLLM_BOTH + """
        messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort include_reasoning
        parallel_tool_calls add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
        media_io_kwargs mm_processor_kwargs return_prompt_text
    """,
    Part.STREAM_OPTIONS: "include_usage continuous_usage_stats",
}  # fmt: skip
"""Of vLLM's `ChatCompletionRequest`, `CompletionRequest` and `StreamOptions`, November 2026, and older `guided_`."""

BODIES: list[type[Body]] = [
    CompletionBody, ChatBody, StreamOptions, Message, ToolCall, FunctionBody, TokenizeBody, DetokenizeBody,
]  # fmt: skip

ROUTES = {Part.COMPLETION: "/v1/completions", Part.CHAT: "/v1/chat/completions"}
ASK: dict[Part, dict[str, Any]] = {
    Part.COMPLETION: {"prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0},
    Part.CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "temperature": 0},
}


def requested(*treatments: Treatment) -> list[Any]:
    """The fields of both routes' bodies that are treated so."""
    return [
        pytest.param(part, field, id=f"{str(part.name).lower()}-{field.name}")
        for part in ROUTES
        for field in fields_of(part).values()
        if field.treatment in treatments
    ]


def test_every_field_of_openais_client_has_a_row() -> None:
    """A newer client with a field that is not here fails this by name: decide what becomes of it and add its row."""
    missing = [
        f"{part.name}.{name}"
        for part, params in OPENAI
        for name in params.__annotations__
        if name not in fields_of(part)
    ]
    assert missing == []


def test_every_field_of_vllm_has_a_row() -> None:
    missing = [f"{part.name}.{name}" for part, names in VLLM.items() for name in {*names.split()} - {*fields_of(part)}]
    assert missing == []


def test_no_field_of_an_object_has_two_rows() -> None:
    for part in Part:
        names = [field.name for field in FIELDS if part in field.parts]
        assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_bodies_hold_what_the_table_says_is_honoured(body: type[Body]) -> None:
    honoured = {field.name for field in fields_of(body.PART).values() if field.treatment is Treatment.HONOURED}
    assert set(body.model_fields) == honoured


@pytest.mark.parametrize("part", ROUTES, ids=lambda part: part.name)
def test_all_that_asks_for_nothing_is_taken_at_once(client: httpx.Client, part: Part) -> None:
    fields = fields_of(part)
    for last in (0, -1):
        asked = {name: field.neutral[last] for name, field in fields.items() if field.neutral}
        notes = {name: "whatever" for name, field in fields.items() if field.treatment is Treatment.NOTE}
        answer = client.post(ROUTES[part], json=ASK[part] | asked | notes)
        assert answer.status_code == 200, answer.text
    nulls = {name: None for name in fields if name not in ASK[part]}
    assert client.post(ROUTES[part], json=ASK[part] | nulls).status_code == 200


@pytest.mark.parametrize(("part", "field"), requested(Treatment.NEUTRAL, Treatment.REFUSED))
def test_what_is_not_supported_is_refused_by_name(client: httpx.Client, part: Part, field: Field) -> None:
    for value in ("something else", {"a": 1}, not field.neutral[0] if field.neutral else True):
        answer = client.post(ROUTES[part], json=ASK[part] | {field.name: value})
        assert answer.status_code == 400, (value, answer.text)
        error = answer.json()["error"]
        assert (error["param"], error["code"]) == (field.name, "unsupported_parameter")
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith(f"{field.name} ({field.meaning})")
        for neutral in field.neutral:
            assert json.dumps(neutral) in error["message"]


@pytest.mark.parametrize(("part", "field"), requested(Treatment.HONOURED))
def test_what_is_honoured_is_checked(client: httpx.Client, part: Part, field: Field) -> None:
    answer = client.post(ROUTES[part], json=ASK[part] | {field.name: {"no": "such value"}})
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"].split(".")[0] == field.name


@pytest.mark.parametrize("value", [True, "0", [0]])
def test_true_is_not_one_and_a_text_is_no_number(client: httpx.Client, value: object) -> None:
    answer = client.post("/v1/completions", json=ASK[Part.COMPLETION] | {"priority": value})
    assert answer.json()["error"]["param"] == "priority"


def test_an_unknown_field_is_refused_by_name(client: httpx.Client) -> None:
    for part, route in ROUTES.items():
        error = client.post(route, json=ASK[part] | {"tempratuer": 1}).json()["error"]
        assert (error["param"], error["code"]) == ("tempratuer", "unknown_parameter")


def test_best_of_as_many_as_n_asks_for_nothing(ai: openai.OpenAI) -> None:
    """langchain-openai sends it so."""
    ask: dict[str, Any] = {"model": MODEL, "prompt": [5, 6], "max_tokens": 2}
    assert len(ai.completions.create(n=2, best_of=2, **ask).choices) == 2
    with pytest.raises(openai.BadRequestError, match=r"only n \(2\) is"):
        ai.completions.create(n=2, best_of=3, **ask)


def test_stream_options_that_ask_for_nothing_need_no_stream(client: httpx.Client) -> None:
    for part, route in ROUTES.items():
        idle = {"stream_options": {"include_usage": False, "include_obfuscation": False}}
        assert client.post(route, json=ASK[part] | idle).status_code == 200
        refused = client.post(route, json=ASK[part] | {"stream_options": {"include_usage": True}})
        assert refused.json()["error"]["param"] == "stream_options"
        padded = {"stream": True, "stream_options": {"include_obfuscation": True}}
        error = client.post(route, json=ASK[part] | padded).json()["error"]
        assert error["param"] == "stream_options.include_obfuscation"


def test_the_usage_so_far_stands_in_every_event_if_asked_for(ai: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    text = ai.completions.create(model=MODEL, prompt=[5, 6], max_tokens=4, stream=True, stream_options=options)
    *chunks, last = [chunk.usage.completion_tokens for chunk in text if chunk.usage]
    assert chunks[-1] == last == 4
    assert chunks == sorted(chunks)
    messages: Any = [{"role": "user", "content": "hi"}]
    ask: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": 4}
    chats = ai.chat.completions.create(stream=True, stream_options=options, **ask)
    assert [chunk.usage.completion_tokens for chunk in chats if chunk.usage][-2:] == [4, 4]
