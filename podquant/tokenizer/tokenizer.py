"""Text to tokens and back, as a checkpoint's tokenizer files say. Knows nothing about requests, steps or HTTP."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from podquant.errors import CheckpointError, RequestError
from podquant.foreign import shown
from podquant.tokenizer.chat_template import ChatTemplate
from podquant.tokenizer.chatml import ChatML, Mark
from podquant.tokenizer.detokenize import Detokenizer
from podquant.tokenizer.files import TokenizerFiles
from podquant.tokenizer.length import check_length
from podquant.tokenizer.template_process import TemplateProcess
from podquant.tokenizer.vocabulary import Vocabulary
from podquant.tokenizer.vocabulary_json import load_json
from podquant.tokenizer.vocabulary_merges import load_merges
from podquant.tokenizer.vocabulary_sentencepiece import load_sentencepiece
from podquant.tokenizer.vocabulary_tekken import load_tekken
from podquant.tokenizer.vocabulary_tiktoken import TiktokenVocabulary, holds_ranks, load_tiktoken

_log = logging.getLogger(__name__)

FILES = (
    *("tokenizer.json", "tekken.json", "vocab.json", "merges.txt", "*.tiktoken", "*.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
"""The files beside the weights that `Tokenizer.load` may read."""


class Tokenizer:
    """A loaded tokenizer; thread-safe.

    Attributes:
        eos_ids: tokens that end an output, by any of generation_config.json, config.json, tokenizer_config.json and
            the chat's format.
        special_ids: tokens without text.
    """

    def __init__(
        self, vocabulary: Vocabulary, eos_ids: Iterable[int] = (), chat: ChatTemplate | ChatML | None = None
    ) -> None:
        self._vocabulary = vocabulary
        self._chat: ChatTemplate | TemplateProcess | ChatML | None = chat
        self.eos_ids = frozenset(eos_ids)
        self.special_ids = vocabulary.special_ids

    @classmethod
    def load(
        cls, directory: Path, config: Mapping[str, Any], *, vocab_size: int | None = None, where: str | None = None
    ) -> Tokenizer:
        """Read a checkpoint directory.

        Args:
            config: its config.json.
            vocab_size: how many ids the model has; None for what `config` says, if anything.
            where: what messages call the directory.

        Raises CheckpointError for missing or bad files, and for a vocabulary that does not fit the model.
        """
        model_type = config.get("model_type")
        vocabulary, files = _load_vocabulary(
            TokenizerFiles.read(directory, where or str(directory)), model_type if isinstance(model_type, str) else None
        )
        size = config.get("vocab_size") if vocab_size is None else vocab_size
        if size is not None:
            _check_fit(vocabulary, files, size)
        chat = files.chat_template() or _chat_format(vocabulary, files)
        eos_ids = files.eos_ids(config)
        end = vocabulary.token_id(files.roles.get("eos_token", ""))
        if end is not None:
            eos_ids.add(end)
        if isinstance(chat, ChatML):
            eos_ids |= chat.end_ids
        return cls(vocabulary, eos_ids, chat)

    def isolate_template(self, *, start: bool = False) -> None:
        """From now on render chats in a process of its own, within limits: for whoever answers strangers.

        Args:
            start: the process now, rather than with the first chat.
        """
        if isinstance(self._chat, ChatTemplate):
            self._chat = TemplateProcess(self._chat)
        if start and isinstance(self._chat, TemplateProcess):
            self._chat.start()

    def close(self) -> None:
        """End that process, if there is one; a further chat starts another."""
        if isinstance(self._chat, TemplateProcess):
            self._chat.close()

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def encode(self, text: str, *, add_special_tokens: bool = True, most: int | None = None) -> list[int]:
        """Token ids; special tokens written out in `text` become those tokens.

        Raises TooManyTokensError where bytes or beginning of a long text show that it has more than `most`.
        """
        if most is not None:
            self._check_length(text, most)
        return self._vocabulary.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in self.special_ids]
        return self._vocabulary.decode(ids)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes a token stands for inside a text, a special one its name; None for an id without a token."""
        return self._vocabulary.token_bytes(token_id)

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """Text for what follows `prompt_ids`, token by token."""
        return self._vocabulary.detokenizer(self.special_ids, prompt_ids)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a chat, special tokens included.

        Raises RequestError if there is no template, or if it refuses the messages.
        """
        if self._chat is None:
            raise RequestError(
                "This model's checkpoint has no chat template (neither chat_template.jinja nor one in "
                "tokenizer_config.json). Use /v1/completions with a prompt.",
                "messages",
            )
        if isinstance(self._chat, ChatML):
            return self._chat.render(messages, tools, add_generation_prompt=add_generation_prompt)
        return self._chat.render(messages, tools, add_generation_prompt=add_generation_prompt, extra=extra)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
        most: int | None = None,
    ) -> list[int]:
        """The tokens of a chat; raises as `apply_chat_template` and `encode` do."""
        if isinstance(self._chat, ChatML):
            if most is not None:
                self._check_length(self._chat.render(messages, tools), most)
            return self._chat.encode(messages, tools, add_generation_prompt=add_generation_prompt)
        if most is not None and isinstance(self._chat, TemplateProcess):
            self._check_user_texts(self._chat, messages, most)
        text = self.apply_chat_template(messages, tools, add_generation_prompt=add_generation_prompt, extra=extra)
        return self.encode(text, add_special_tokens=False, most=most)

    def _check_user_texts(self, chat: TemplateProcess, messages: Sequence[Mapping[str, Any]], most: int) -> None:
        """Raise TooManyTokensError where what users say shows it alone: to render it costs many times as much."""
        said = [message.get("content") for message in messages if message.get("role") == "user"]
        text = "".join(each.strip() for each in said if isinstance(each, str))
        if len(text) > most and chat.keeps_user_texts():
            self._check_length(text, most)

    def _check_length(self, text: str, most: int) -> None:
        def count(beginning: str) -> int:
            return len(self._vocabulary.encode(beginning, add_special_tokens=False))

        check_length(text, most, self._vocabulary.longest, count, dropped=self._vocabulary.dropped)


def _load_vocabulary(files: TokenizerFiles, model_type: str | None) -> tuple[Vocabulary, TokenizerFiles]:
    """The vocabulary in the form that says most, and the files with what it says of roles."""
    whole = files.directory / "tokenizer.json"
    if whole.is_file():
        return load_json(files, whole), files
    for path in files.directory.glob("tekken.json"):
        return load_tekken(files, path)
    for path in [*sorted(files.directory.glob("*.tiktoken")), *files.directory.glob("tiktoken.model")]:
        return load_tiktoken(files, path)
    for path in [*files.directory.glob("tokenizer.model"), *sorted(files.directory.glob("*.model"))]:
        return load_tiktoken(files, path) if holds_ranks(path) else load_sentencepiece(files, path, model_type)
    for path in files.directory.glob("vocab.json"):
        return load_merges(files, path, model_type)
    raise CheckpointError(
        f"{files.where}/tokenizer.json is missing, and so are tekken.json, *.tiktoken, tiktoken.model, tokenizer.model "
        "(or any other *.model) and vocab.json: the forms of vocabularies that podquant reads. Save one beside the "
        "weights (transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)), or serve token ids only "
        "(--skip-tokenizer-init)."
    )


def _check_fit(vocabulary: Vocabulary, files: TokenizerFiles, vocab_size: int) -> None:
    """Refuse a vocabulary that gives ids the model has no embedding for."""
    if vocabulary.num_ids > vocab_size:
        raise CheckpointError(
            f"{files.where}: the tokenizer's vocabulary has ids up to {vocabulary.num_ids - 1}, but the model's "
            f"`vocab_size` is {vocab_size}. The tokenizer is of another model: download it again with the weights."
        )
    for role in ("bos_token", "eos_token"):
        content = files.roles.get(role, "")
        token_id = vocabulary.token_id(content)
        if token_id is not None and token_id >= vocab_size:
            raise CheckpointError(
                f"{files.where}: `{role}` {shown(content)} has id {token_id}, but the model's `vocab_size` is "
                f"{vocab_size}. The tokenizer is of another model: download it again with the weights."
            )
    beyond = [token.content for token in files.added if token.token_id >= vocab_size]
    if beyond:  # some checkpoints carry the added tokens of a larger sibling
        _log.warning(
            "%s: added tokens that the model lacks: %s; a text with one is refused", files.where, shown(beyond, 200)
        )


def _chat_format(vocabulary: Vocabulary, files: TokenizerFiles) -> ChatML | None:
    """The format that generation_config.json or the tokenizer's class names, where there is no template."""
    if not isinstance(vocabulary, TiktokenVocabulary):
        return None
    ids = {mark: vocabulary.token_id(mark.value) for mark in Mark}
    known = {mark: token_id for mark, token_id in ids.items() if token_id is not None}
    if files.generation.get("chat_format", vocabulary.chat_format) != "chatml" or len(known) < len(ids):
        return None
    return ChatML(known, vocabulary.encode_plain)
