"""Chat templates that would never end or fit, in the process that renders them, and what that process knows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from podquant.errors import CheckpointError, RequestError
from podquant.tokenizer.chat_template import ChatTemplate
from podquant.tokenizer.template_process import TemplateLimits, TemplateProcess

HI = [{"role": "user", "content": "hi"}]
LIMITS = TemplateLimits(seconds=2.0, characters=1 << 20, memory_bytes=1 << 30)


def bomb(expression: str) -> str:
    """A template that is a bomb if a message says so."""
    return "{% if messages[0].content == 'bang' %}" + expression + "{% endif %}{{ messages[0].content }}"


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "a loop in a loop": (LOOP, "took more than 2 s"),
    "a range": ("{% for a in range(10**9) %}{% endfor %}", "Range too big"),
    "a long text": ("{{ 'x' * 10**10 }}", "MemoryError"),
    "a wide text": ("{{ 'x'|center(10**9) }}", "MemoryError"),
    "a wider text": ("{{ 'x'|center(10**10) }}", "MemoryError"),
    "a wide number": ("{{ '%1000000000d'|format(1) }}", "MemoryError"),
    "a wide field": ("{{ '{:>10000000000}'.format(1) }}", "cannot render"),
    "a long list": ("{{ ([0] * 10**10)|length }}", "MemoryError"),
    "a large number": ("{{ 2 ** (10 ** 10) }}", ""),
    "a power of powers": ("{{ 9 ** (9 ** 9) }}", ""),
    "gigabytes in pieces": ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "more than 1048576 characters"),
    "gigabytes in a macro": (
        "{% macro m() %}{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endmacro %}{{ m() }}",
        "",
    ),
    "a macro without end": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "a loop without end": ("{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}", "recursion"),
    "doubling": (
        "{% set n = namespace(t='x') %}{% for a in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
        "",
    ),
    "joining": ("{{ (['x' * 99999] * 99999)|join }}", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_an_error_of_its_request_alone(name: str) -> None:
    source, message = BOMBS[name]
    process = TemplateProcess(ChatTemplate(bomb(source), {}, "here/chat_template.jinja"), LIMITS)
    try:
        with pytest.raises(RequestError, match=r"here/chat_template\.jinja") as caught:
            process.render([{"role": "user", "content": "bang"}])
        assert message in str(caught.value)
        assert len(str(caught.value)) < 2000
        assert process.render(HI) == "hi"
    finally:
        process.close()


@pytest.fixture
def process() -> Iterator[TemplateProcess]:
    template = ChatTemplate(
        {"default": "{{ bos }}{{ messages[0].content }}", "tool_use": "{{ tools }}"}, {"bos": "<s>"}, "here"
    )
    process = TemplateProcess(template)
    yield process
    process.close()


def test_it_renders_as_the_template_does(process: TemplateProcess) -> None:
    for content in ("hi", 'é漢\U0001f600\n\\"', "x" * 3_000_000, ""):
        assert process.render([{"role": "user", "content": content}]) == "<s>" + content
    assert process.render(HI, [{"type": "function"}]) == "[{'type': 'function'}]"
    assert process.render(HI, extra={"bos": "B"}) == "Bhi"


def test_it_may_be_closed_and_goes_on(process: TemplateProcess) -> None:
    process.start()
    for _ in range(2):
        process.close()
        assert process.render(HI) == "<s>hi"


def test_what_the_template_refuses_is_said_in_its_words() -> None:
    process = TemplateProcess(ChatTemplate("{{ raise_exception('no such role') }}", {}, "here"))
    try:
        with pytest.raises(RequestError, match=r"\(here\) cannot render these messages: no such role\."):
            process.render(HI)
    finally:
        process.close()


def test_a_text_that_is_not_unicode_is_refused() -> None:
    process = TemplateProcess(ChatTemplate("{{ '\\ud800' }}{{ messages[0].content }}", {}, "here"))
    try:
        with pytest.raises(RequestError, match=r"\(here\) writes half a surrogate pair"):
            process.render(HI)
    finally:
        process.close()


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 100_000 + ")" * 100_000 + " }}",
        "{{ " + "-" * 100_000 + "1 }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "{% for a in b %}" * 100 + "{% endfor %}" * 100,
        "{{ " + "[" * 5000 + "]" * 5000 + " }}",
        "x" * (1 << 20) + "x",
    ],
)
def test_a_template_that_cannot_be_compiled_is_an_error_of_the_checkpoint(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"here/t\.jinja: the chat template .* Fix or remove it"):
        ChatTemplate(source, {}, "here/t.jinja")


@pytest.mark.parametrize("expression", ["'x' * 10**8", "'x'|center(10**8)", "'%100000000d'|format(1)", "[0] * 10**8"])
@pytest.mark.parametrize("place", ["{{ %s }}", "{%% if %s %%}{%% endif %%}", "{%% set a = %s %%}", "{{ f(%s) }}"])
def test_nothing_is_computed_while_compiling(expression: str, place: str) -> None:
    tracemalloc.start()
    try:
        ChatTemplate(place % expression, {}, "here")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 10_000_000


PARENT = """
import os, sys, threading
from podquant.tokenizer.chat_template import ChatTemplate
from podquant.tokenizer.template_process import TemplateLimits, TemplateProcess
process = TemplateProcess(ChatTemplate(sys.argv[1], {}, "here"), TemplateLimits(seconds=100))
process.start()
os.write(1, b"%d\\n" % process._child._process.pid)
process.render([{"role": "user", "content": "hi"}])
"""


@pytest.mark.slow
def test_it_ends_with_its_parent_and_knows_nothing_of_its() -> None:
    environment = os.environ | {"PODQUANT_API_KEY": "planted-key", "HF_TOKEN": "planted-token"}
    with subprocess.Popen([sys.executable, "-c", PARENT, LOOP], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        files = sorted(os.readlink(entry).partition(":")[0] for entry in Path(f"/proc/{pid}/fd").iterdir())
        assert [name for name in files if name != "/dev/null"] == ["socket"]
        assert b"planted" not in Path(f"/proc/{pid}/environ").read_bytes()
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process is there, and more than a record of its end."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
