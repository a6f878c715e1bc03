"""Renderings against those of transformers (`tests/data/chat_templates.json` holds both)."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from podquant.errors import CheckpointError, RequestError
from podquant.tokenizer.chat_template import ChatTemplate

CASES = json.loads((Path(__file__).parents[1] / "data" / "chat_templates.json").read_text())["cases"]
HI = [{"role": "user", "content": "hi"}]


def template(source: str | dict[str, str]) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, "some/chat_template.jinja")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_renders_as_transformers_does(case: dict[str, Any]) -> None:
    rendered = template(case["template"]).render(
        case["messages"], case["tools"], add_generation_prompt=case["add_generation_prompt"], extra=case["extra"]
    )
    assert rendered == case["expected"]


def test_a_template_knows_the_date() -> None:
    before = datetime.now().replace(microsecond=0)
    rendered = template("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}").render(HI)
    assert before <= datetime.fromisoformat(rendered) <= datetime.now()


def test_a_template_for_tools_is_taken_when_there_are_tools() -> None:
    both = template({"default": "plain", "tool_use": "{{ tools[0].name }}"})
    assert both.render(HI) == "plain"
    assert both.render(HI, []) == "plain"
    assert both.render(HI, [{"name": "clock"}]) == "clock"


def test_a_request_cannot_replace_the_messages() -> None:
    assert template("{{ messages[0].content }}").render(HI, extra={"messages": []}) == "hi"


ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user'] %}{{ raise_exception('Unknown role') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "role"),
    [
        (ROLES, "system"),
        (STRICT, "system"),
        ("{# developer #}" + ROLES + "{{ '' if true else 'as a developer would' }}", "system"),
        (ROLES + "{% if messages[0].role == 'developer' %}{% endif %}", "developer"),
        (ROLES + '{% if messages[0]["role"] in ["system", "developer"] %}{% endif %}', "developer"),
    ],
)
def test_a_developer_is_the_system_where_a_template_does_not_know_the_role(source: str, role: str) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *HI]
    assert template(source).render(messages) == f"<{role}>Be brief.<user>hi"
    assert messages[0]["role"] == "developer"


def test_each_of_several_templates_tells_whether_it_knows_the_role() -> None:
    both = template({"default": ROLES, "tool_use": ROLES + "{% set known = 'developer' %}"})
    messages = [{"role": "developer", "content": "x"}]
    assert both.render(messages) == "<system>x"
    assert both.render(messages, [{"name": "clock"}]) == "<developer>x"


def test_fields_that_are_null_are_left_out() -> None:
    message = {"role": "assistant", "content": "b", "tool_calls": None, "refusal": None}
    assert template("{{ messages[0].keys() | list }}").render([message]) == "['role', 'content']"


def test_a_field_that_a_template_wants_null_is_left_in() -> None:
    # as DeepSeek's have it
    source = "{% if messages[0].content is none %}call{% else %}{{ messages[0].content + '' }}{% endif %}"
    assert template(source).render([{"role": "assistant", "content": None, "tool_calls": []}]) == "call"


@pytest.mark.parametrize("given", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("known", ["reasoning_content", "thinking"])
def test_reasoning_has_the_name_that_a_template_knows(given: str, known: str) -> None:
    message = {"role": "assistant", "content": "b", given: "hm"}
    assert template("{{ messages[0]." + known + " }}").render([message]) == "hm"


def test_tools_and_documents_are_none_where_there_are_none() -> None:
    source = "{{ tools is none }} {{ documents is none }} {{ documents | length if documents }}"
    assert template(source).render(HI) == "True True "
    assert template(source).render(HI, extra={"documents": [{"text": "x"}]}) == "True False 1"


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{{ raise_exception('roles must alternate') }}", "cannot render these messages: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "cannot render these messages: can only concatenate str"),
        ("{{ messages.append(1) }}", "cannot render these messages: access to attribute 'append'"),
        ("{{ messages.__class__.__mro__ }}", "cannot render these messages: access to attribute '__class__'"),
    ],
)
def test_what_a_template_refuses_is_an_error_of_the_request(source: str, match: str) -> None:
    with pytest.raises(RequestError, match=match) as raised:
        template(source).render(HI)
    assert raised.value.param == "messages"


def test_a_broken_template_is_an_error_of_the_checkpoint() -> None:
    with pytest.raises(
        CheckpointError, match=r"some/chat_template\.jinja: the chat template is not valid Jinja, line 2"
    ):
        template("ok\n{% if %}")


def test_templates_without_a_default_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"expected a chat template named 'default', found \['rag', 'tool_use'\]"):
        template({"tool_use": "", "rag": ""})
