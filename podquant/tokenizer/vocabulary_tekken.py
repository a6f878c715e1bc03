"""Mistral's `tekken.json`: ranks of byte strings, as tiktoken has them, after the special tokens.

The ids are those of mistral-common's `Tekkenizer`. Unlike there, special tokens are found in a text, as a chat template
writes them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from podquant.errors import CheckpointError
from podquant.foreign import cut, shown
from podquant.tokenizer.files import TokenizerFiles
from podquant.tokenizer.jsonfile import decode
from podquant.tokenizer.vocabulary_tiktoken import TiktokenClass, TiktokenVocabulary

_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_FIRST_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
"""Special tokens of files up to version v7 that list none."""
_LAST_UNLISTED = 7

_MOST_SPECIAL = 1 << 20
"""Of special tokens: files have some 1,000."""

_ADVICE = "Correct it, or take the file that the model came with."


@dataclass(frozen=True)
class _Special:
    content: str
    is_control: bool


def load_tekken(files: TokenizerFiles, path: Path) -> tuple[TiktokenVocabulary, TokenizerFiles]:
    """Read `path` with what the other files say; also the files, with Mistral's roles where they name none.

    Raises CheckpointError.
    """
    where = f"{files.where}/{path.name}"
    content = decode(path.read_bytes(), where)
    config = _field(where, content, "config", dict)
    pattern = _field(where, config, "pattern", str)
    num_special = _field(where, config, "default_num_special_tokens", int)
    if not 0 <= num_special <= _MOST_SPECIAL:
        raise CheckpointError(
            f"{where}: expected `default_num_special_tokens` from 0 to {_MOST_SPECIAL:,}, got {shown(num_special)}. "
            f"{_ADVICE}"
        )
    special = _special_tokens(where, content, config, num_special)
    num_ranks = _field(where, config, "default_vocab_size", int) - num_special
    ranks = _ranks(where, _field(where, content, "vocab", list), num_ranks)
    files = files.with_roles(_ROLES)
    ids = {token.content: token_id for token_id, token in enumerate(special)}
    try:
        vocabulary = TiktokenVocabulary(
            TiktokenClass(pattern),
            {token: num_special + rank for rank, token in enumerate(ranks)},
            ids,
            {token_id for token_id, token in enumerate(special) if token.is_control or token.content in files.special},
            _role_ids(files, ids, "bos", default=True),  # as mistral-common has it
            _role_ids(files, ids, "eos", default=False),
        )
    except ValueError as error:
        raise CheckpointError(
            f"{where}: `pattern` {shown(pattern)} is not a pattern tiktoken knows: {cut(str(error), 200)}. {_ADVICE}"
        ) from error
    return vocabulary, files


def _special_tokens(where: str, content: Any, config: dict[str, Any], total: int) -> list[_Special]:
    """The special tokens by id, those that the file does not name too."""
    listed = content.get("special_tokens")
    if listed is None:
        version = cut(str(config.get("version")))
        if version.removeprefix("v") not in {str(number) for number in range(1, _LAST_UNLISTED + 1)}:
            raise CheckpointError(
                f"{where}: version {version} lists no `special_tokens`, expected from version v{_LAST_UNLISTED + 1} on."
                f" {_ADVICE}"
            )
        special = [_Special(name, is_control=True) for name in _FIRST_SPECIAL]
    elif not isinstance(listed, list):
        raise CheckpointError(f"{where}: expected `special_tokens` to be a list, got {shown(listed)}. {_ADVICE}")
    else:
        special = [_special(where, token_id, entry) for token_id, entry in enumerate(listed)]
    special += [_Special(f"<SPECIAL_{token_id}>", is_control=True) for token_id in range(len(special), total)]
    num_names = len({token.content for token in special})
    if len(special) != total or num_names != total:
        raise CheckpointError(
            f"{where}: `default_num_special_tokens` is {total}, but there are {len(special)} special tokens with "
            f"{num_names} names. {_ADVICE}"
        )
    return special


def _special(where: str, token_id: int, entry: Any) -> _Special:
    name = entry.get("token_str") if isinstance(entry, dict) else None
    if not isinstance(name, str) or entry.get("rank") != token_id:
        raise CheckpointError(
            f"{where}: expected `special_tokens[{token_id}]` to have rank {token_id} and a `token_str`, got "
            f"{shown(entry)}. {_ADVICE}"
        )
    return _Special(name, is_control=entry.get("is_control") is not False)


def _ranks(where: str, vocab: list[Any], num: int) -> list[bytes]:
    """The first `num` tokens, by rank; a file may hold more than its model has embeddings for."""
    if not 256 <= num <= len(vocab):
        raise CheckpointError(
            f"{where}: `default_vocab_size` less the special tokens is {num}, but `vocab` has {len(vocab)} tokens; "
            f"expected at least that many, and 256. {_ADVICE}"
        )
    tokens = []
    for rank, entry in enumerate(vocab[:num]):
        try:
            token = base64.b64decode(entry["token_bytes"], validate=True)
            is_next = entry["rank"] == rank and (rank >= 256 or token == bytes([rank]))
        except (TypeError, KeyError, ValueError):
            is_next = False
        if not is_next:
            raise CheckpointError(
                f"{where}: expected `vocab[{rank}]` to have rank {rank} and `token_bytes` in base64 (the first 256 are "
                f"the bytes in order), got {shown(entry)}. {_ADVICE}"
            )
        tokens.append(token)
    if len(set(tokens)) < num:
        raise CheckpointError(f"{where}: `vocab` holds a token twice. {_ADVICE}")
    return tokens


def _role_ids(files: TokenizerFiles, ids: Mapping[str, int], role: str, *, default: bool) -> list[int]:
    token_id = ids.get(files.roles.get(f"{role}_token", ""))
    return [token_id] if files.role_added(role, default=default) and token_id is not None else []


def _field[T](where: str, values: Any, name: str, kind: type[T]) -> T:
    value = values.get(name) if isinstance(values, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(
            f"{where}: expected `{name}` to be {kind.__name__}, got {shown(value)}. Is this Mistral's tekken.json? "
            f"{_ADVICE}"
        )
    return value
