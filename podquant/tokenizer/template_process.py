"""A chat template in a process of its own: templates come from strangers, and one may loop for ever or write gigabytes.

The process is started at the first chat, serves one after another, is killed when one exceeds its limits, and started
again for the next. It inherits one socket and nothing that could hold a secret, and ends when that socket closes. What
it is asked comes in Python's own form, which is made and read ten times as fast as JSON; its answers are plain text, as
nothing else that it says is to be trusted.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from podquant.errors import RequestError
from podquant.tokenizer.chat_template import ChatTemplate
from podquant.tokenizer.frames import receive, send
from podquant.tokenizer.template_child import ASKED, REFUSED

_START_SECONDS = 60.0
_BYTES_A_CHARACTER = 4
_LONGEST_REFUSAL = 1 << 16
_INHERITED = ("TZ", "LANG", "LC_ALL", "LC_TIME", "PYTHONDONTWRITEBYTECODE")
"""What a template may see, as in the time of day that it writes."""

_LONG = "line\n" * (1 << 14)
"""Longer than what a template would shorten a text to."""


@dataclass(frozen=True)
class TemplateLimits:
    """Of rendering one chat.

    Attributes:
        seconds: of time, and of the CPU's.
        characters: of the text.
        memory_bytes: of the process's address space, the interpreter's own included.
    """

    seconds: float = 10.0
    characters: int = 1 << 26
    memory_bytes: int = 2 << 30


class TemplateProcess:
    """Renders as a `ChatTemplate` does, within limits. Thread-safe; blocks, so call it off an event loop."""

    def __init__(self, template: ChatTemplate, limits: TemplateLimits | None = None) -> None:
        self._template = template
        self._limits = limits or TemplateLimits()
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._keeps_user_texts: bool | None = None

    def start(self) -> None:
        """Start the process now, so that the first chat need not wait for it; where that fails, that tries again."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._running()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """As `ChatTemplate.render`. Raises RequestError too if that exceeds a limit."""
        ask = {
            "messages": list(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "extra": extra,
        }
        message = marshal.dumps(ask)
        with self._lock:
            try:
                kind, text = self._running().ask(message, self._limits.seconds)
            except TimeoutError:
                self._end()
                raise self._refusal(f"took more than {self._limits.seconds:g} s") from None
            except (OSError, ValueError):
                self._end()
                raise self._refusal("took more time or memory than it may") from None
        if kind == REFUSED:
            raise RequestError(text, "messages")
        return text

    def keeps_user_texts(self) -> bool:
        """Whether a chat's text has in it, whole, what users say: then that alone tells its length at the least.

        One trial shows it. What assistants say is another matter: templates leave their earlier reasoning out.
        """
        if self._keeps_user_texts is None:
            first, second = (f"{number}{_LONG}{number}" for number in range(2))
            said = [("user", first), ("assistant", "a"), ("user", second)]
            try:
                text = self.render([{"role": role, "content": content} for role, content in said])
            except RequestError:  # it may be for want of time, so the next one tries again
                return False
            self._keeps_user_texts = first in text and second in text
        return self._keeps_user_texts

    def close(self) -> None:
        """End the process; a further chat starts another."""
        with self._lock:
            self._end()

    def _running(self) -> _Child:
        if self._child is None:
            self._child = _Child(self._template, self._limits)
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def _refusal(self, what: str) -> RequestError:
        return RequestError(
            f"The model's chat template ({self._template.where}) {what} on these messages, and was stopped. Send "
            "fewer or shorter ones; if it does so on any, fix the template.",
            "messages",
        )


class _Child:
    """One process; raises OSError or ValueError if it does not answer as it should, TimeoutError if not in time."""

    def __init__(self, template: ChatTemplate, limits: TemplateLimits) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "podquant.tokenizer.template_child"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env=_environment(),
            )
        self._most = _BYTES_A_CHARACTER * limits.characters + _LONGEST_REFUSAL
        declaration = {"source": template.sources, "variables": template.variables, "where": template.where}
        try:
            self.ask(marshal.dumps(declaration | asdict(limits)), _START_SECONDS)
        except BaseException:
            self.end()
            raise

    def ask(self, message: bytes, seconds: float) -> tuple[int, str]:
        """The kind of its answer, and the text."""
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        send(self._socket, ASKED, message)
        kind, text = receive(self._socket, self._most, deadline)
        return kind, text.decode()

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        self._socket.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()


def _environment() -> dict[str, str]:
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return inherited | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
