"""Text to tokens and back, as a checkpoint's tokenizer files say. Knows nothing about requests, steps or HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from podquant.errors import CheckpointError, RequestError
from podquant.runtime.chat_template import ChatTemplate
from podquant.runtime.detokenize import IncrementalDetokenizer


class Tokenizer:
    """A loaded tokenizer; thread-safe.

    Attributes:
        eos_ids: tokens that end an output, by any of generation_config.json, config.json and tokenizer_config.json.
        special_ids: tokens without text.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, eos_ids: Iterable[int] = (), chat_template: ChatTemplate | None = None
    ) -> None:
        # some checkpoints ship the truncation or padding of their last training run
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self.eos_ids = frozenset(eos_ids)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def load(cls, directory: Path, config: Mapping[str, Any]) -> Tokenizer:
        """Read a checkpoint directory; `config` is its config.json. Raises CheckpointError for missing or bad files."""
        tokenizer = _read_tokenizer(directory / "tokenizer.json")
        settings = _read_json(directory / "tokenizer_config.json")
        named = _token_contents(_read_json(directory / "special_tokens_map.json")) | _token_contents(settings)
        known = [content for content in named.values() if tokenizer.token_to_id(content) is not None]
        tokenizer.add_special_tokens(known)  # as transformers does, whatever tokenizer.json flags them as
        eos_ids = _ids(config.get("eos_token_id"))
        eos_ids |= _ids(_read_json(directory / "generation_config.json").get("eos_token_id"))
        if "eos_token" in named:
            eos_ids |= _ids(tokenizer.token_to_id(named["eos_token"]))
        return cls(tokenizer, eos_ids, _read_chat_template(directory, settings, named))

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written out in `text` become those tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, prompt_ids: Sequence[int]) -> IncrementalDetokenizer:
        """Text for what follows `prompt_ids`, token by token."""
        return IncrementalDetokenizer(self._tokenizer, self.special_ids, prompt_ids)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """`ChatTemplate.render`, to be encoded with `add_special_tokens=False`.

        Raises RequestError if there is no template, or if it refuses the messages.
        """
        if self._chat_template is None:
            raise RequestError(
                "This model's checkpoint has no chat template (neither chat_template.jinja nor one in "
                "tokenizer_config.json). Use /v1/completions with a prompt.",
                "messages",
            )
        return self._chat_template.render(messages, tools, add_generation_prompt=add_generation_prompt, extra=extra)


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: podquant reads tokenizers in Hugging Face's tokenizer.json form. "
            "Save one beside the weights (transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...))."
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{path} is not a tokenizer the `tokenizers` library can read: {error}. Download it again."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file that a checkpoint may lack."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}. Download it again.")
    return value


def _token_contents(settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, written as a string or as an object with `content`."""
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _ids(value: int | list[int] | None) -> set[int]:
    if value is None:
        return set()
    return set(value) if isinstance(value, list) else {value}


def _read_chat_template(
    directory: Path, settings: Mapping[str, Any], variables: Mapping[str, str]
) -> ChatTemplate | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(path.read_text(encoding="utf-8"), variables, str(path))
    source = settings.get("chat_template")
    if not source:
        return None
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}
    return ChatTemplate(source, variables, str(directory / "tokenizer_config.json"))
