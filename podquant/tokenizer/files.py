"""What the small JSON files beside a vocabulary say: roles, added tokens, end tokens, chat templates.

Knows nothing of how text becomes tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from podquant.errors import CheckpointError
from podquant.foreign import shown
from podquant.tokenizer.added_tokens import AddedToken
from podquant.tokenizer.chat_template import ChatTemplate
from podquant.tokenizer.jsonfile import GENERATION, decode_object

_ADVICE = "Correct it, or take the file that the model came with."

_MOST_ID = 2**31 - 1
_DIGITS = len(str(_MOST_ID))

_FLAGS = ("special", "lstrip", "rstrip", "single_word")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of one checkpoint, those it lacks as if they were empty.

    Attributes:
        directory: where they are.
        where: what messages call it.
        settings: tokenizer_config.json.
        generation: generation_config.json.
        roles: role → token, such as `eos_token` → `</s>`, of special_tokens_map.json and tokenizer_config.json.
        added: `added_tokens_decoder` of tokenizer_config.json and added_tokens.json, by id.
        listed: further special tokens by name: `additional_special_tokens`, `extra_special_tokens`.
        special: contents of tokens without text: those of the roles, of `listed` and of `added`.
    """

    directory: Path
    where: str
    settings: dict[str, Any]
    generation: dict[str, Any]
    roles: dict[str, str]
    added: tuple[AddedToken, ...]
    listed: tuple[str, ...]
    special: frozenset[str]

    @classmethod
    def read(cls, directory: Path, where: str) -> TokenizerFiles:
        """Raises CheckpointError for what is not the JSON it should be."""

        def read(name: str) -> dict[str, Any]:
            return _read_json(directory / name, f"{where}/{name}")

        settings, names = read("tokenizer_config.json"), read("special_tokens_map.json")
        added = _added_tokens(settings, f"{where}/tokenizer_config.json")
        for content, token_id in read("added_tokens.json").items():
            if not _is_id(token_id):
                raise _not_an_id(f"{where}/added_tokens.json", content, token_id)
            added.setdefault(token_id, AddedToken(content, token_id))
        special = {token.content for token in added.values() if token.special}
        listed = []
        for source in (names, settings):
            special |= set(_contents(source).values())
            listed += [content for name in _LISTS for content in _listed(source.get(name))]
        return cls(
            directory,
            where,
            settings,
            read(GENERATION),
            _contents(names) | _contents(settings),
            tuple(added[token_id] for token_id in sorted(added)),
            tuple(dict.fromkeys(listed)),
            frozenset(special.union(listed)),
        )

    @property
    def class_name(self) -> str | None:
        """`tokenizer_class` of tokenizer_config.json, less the ending that says in which language it is written.

        Raises CheckpointError where it is no text.
        """
        name = self.settings.get("tokenizer_class")
        if name is not None and not isinstance(name, str):
            raise CheckpointError(
                f"{self.where}/tokenizer_config.json: expected `tokenizer_class` to be a text, got {shown(name)}. "
                f"{_ADVICE}"
            )
        return name.removesuffix("Fast") if name else None

    def with_roles(self, roles: Mapping[str, str]) -> TokenizerFiles:
        """The same with further roles, where the files do not mention them."""
        more = {role: content for role, content in roles.items() if role not in self.roles | self.settings}
        return replace(self, roles=self.roles | more, special=self.special | frozenset(more.values()))

    def role_added(self, role: str, *, default: bool = False) -> bool:
        """Whether tokenizer_config.json wants the token of a role, `bos` or `eos`, added to every text."""
        wanted = self.settings.get(f"add_{role}_token")
        return default if wanted is None else wanted is True

    def eos_ids(self, config: Mapping[str, Any]) -> set[int]:
        """The end tokens of config.json, given, and of generation_config.json: one, several or none each."""
        ids: set[int] = set()
        for name, values in (("config.json", config), (GENERATION, self.generation)):
            value = values.get("eos_token_id")
            several = value if isinstance(value, list) else [] if value is None else [value]
            for token_id in several:
                if not _is_id(token_id):
                    raise _not_an_id(f"{self.where}/{name}", "eos_token_id", token_id)
            ids.update(several)
        return ids

    def chat_template(self) -> ChatTemplate | None:
        """That of chat_template.jinja, tokenizer_config.json or chat_template.json, the first of them that has one.

        Files in additional_chat_templates/ go along under their names.
        """
        path = self.directory / "chat_template.jinja"
        name, source = path.name, self._text(path) if path.is_file() else None
        if source is None:
            name, source = "tokenizer_config.json", self.settings.get("chat_template")
        if not source:
            name = "chat_template.json"
            source = _read_json(self.directory / name, f"{self.where}/{name}").get("chat_template")
        if not source:
            return None
        sources = _templates(source, f"{self.where}/{name}")
        named = sorted(self.directory.glob("additional_chat_templates/*.jinja"))
        return ChatTemplate(
            sources | {each.stem: self._text(each) for each in named}, self.roles, f"{self.where}/{name}"
        )

    def _text(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.where}/{path.relative_to(self.directory)} is not UTF-8: {error}. {_ADVICE}"
            ) from error


def _templates(source: Any, where: str) -> dict[str, str]:
    """Name → source of chat templates, given as one text, by name, or as a list of named ones."""
    if isinstance(source, str):
        return {"default": source}
    if isinstance(source, list) and all(isinstance(entry, dict) for entry in source):
        source = {entry.get("name"): entry.get("template") for entry in source}
    if not isinstance(source, dict) or not all(isinstance(text, str) for each in source.items() for text in each):
        raise CheckpointError(
            f"{where}: expected `chat_template` to be a text, or a list of objects with `name` and `template`, got "
            f"{shown(source, 120)}. Correct or remove it; without one the model serves completions only."
        )
    return source


def _read_json(path: Path, where: str) -> dict[str, Any]:
    """The object in a file that a checkpoint may lack."""
    if not path.is_file():
        return {}
    return decode_object(path.read_bytes(), where)


def _added_tokens(settings: Mapping[str, Any], where: str) -> dict[int, AddedToken]:
    tokens = {}
    given = settings.get("added_tokens_decoder") or {}
    entries = given.items() if isinstance(given, dict) else [("", given)]
    for key, value in entries:
        is_id = key.isdecimal() and len(key) <= _DIGITS and int(key) <= _MOST_ID
        if not is_id or not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise CheckpointError(
                f"{where}: expected `added_tokens_decoder` to map ids to objects with `content`, got {shown(key)}: "
                f"{shown(value)}. {_ADVICE}"
            )
        flags = {name: value.get(name) is True for name in _FLAGS}
        normalized = value.get("normalized", not flags["special"]) is True
        tokens[int(key)] = AddedToken(value["content"], int(key), normalized=normalized, **flags)
    return tokens


def _contents(settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, written as a string or as an object with `content`."""
    tokens = {name: _content(value) for name, value in settings.items() if name.endswith("_token")}
    return {name: content for name, content in tokens.items() if content is not None}


def _listed(value: Any) -> list[str]:
    """Names of tokens, in a list or by role."""
    several = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    contents = [_content(each) for each in several]
    return [content for content in contents if content is not None]


def _content(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_ID


def _not_an_id(where: str, name: str, value: Any) -> CheckpointError:
    return CheckpointError(f"{where}: expected a token id for {shown(name)}, got {shown(value)}. {_ADVICE}")
