"""ChatML as first-generation Qwen's own code writes it: each text of a chat is encoded by itself, as plain text.

So no special token that a message spells out becomes one, and a newline at the start of a message does not merge with
the one before it. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from podquant.errors import RequestError

DEFAULT_SYSTEM = "You are a helpful assistant."
"""Qwen-7B-Chat's `chat` says so where the caller gives no system message."""

_ROLES = ("system", "user", "assistant")
_SAME = {"developer": "system"}


class Mark(Enum):
    """The special tokens around a message."""

    START = "<|im_start|>"
    END = "<|im_end|>"


class ChatML:
    """Chats as text and as tokens, after Qwen-7B-Chat's `make_context` (qwen_generation_utils.py).

    Args:
        ids: of the marks.
        encode_plain: gives the tokens of a text in which no special token is looked for.

    Attributes:
        end_ids: tokens that end an answer: its turn ends, or another begins (`get_stop_words_ids`).
    """

    def __init__(self, ids: Mapping[Mark, int], encode_plain: Callable[[str], list[int]]) -> None:
        self._ids = dict(ids)
        self._encode_plain = encode_plain
        self.end_ids = frozenset(self._ids.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The chat as text. Raises RequestError for roles or tools that Qwen's code does not know."""
        parts = _parts(messages, tools, add_generation_prompt)
        return "".join(part.value if isinstance(part, Mark) else part for part in parts)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The chat as tokens. Raises RequestError as `render` does."""
        ids: list[int] = []
        for part in _parts(messages, tools, add_generation_prompt):
            ids += [self._ids[part]] if isinstance(part, Mark) else self._encode_plain(part)
        return ids


def _parts(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, add_generation_prompt: bool
) -> Iterator[str | Mark]:
    if tools:
        raise RequestError("This model's chat format (ChatML as Qwen's first generation has it) has no tools.", "tools")
    messages = [{**message, "role": _SAME.get(message.get("role", ""), message.get("role"))} for message in messages]
    wrong = [message.get("role") for message in messages if message.get("role") not in _ROLES]
    if wrong:
        raise RequestError(
            f"This model's chat format (ChatML) has the roles {', '.join(_ROLES)}, got {wrong[0]!r}.", "messages"
        )
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    for index, message in enumerate(messages):
        if index:
            yield "\n"
        yield from (Mark.START, message["role"], "\n", message["content"], Mark.END)
    if add_generation_prompt:
        yield from ("\n", Mark.START, "assistant", "\n")
