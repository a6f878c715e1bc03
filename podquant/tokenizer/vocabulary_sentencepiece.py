"""Vocabularies in sentencepiece's own form, `tokenizer.model`, where a checkpoint has no other.

The library encodes; decoding is that of its `Decode`, told token by token, with the tokens that a checkpoint adds.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from pathlib import Path

import sentencepiece

from podquant.errors import CheckpointError
from podquant.tokenizer.detokenize import ByteDetokenizer, Detokenizer
from podquant.tokenizer.files import AddedToken, TokenizerFiles

_SPACE = "▁"
_NO_PREFIX = b"\x1a\x02\x18\x00"
"""Appended to a model: `normalizer_spec {add_dummy_prefix: false}` (sentencepiece_model.proto); protobuf merges it."""

_EACH_BYTE = "podquant.each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """sentencepiece shows a replacement character for each byte that is part of no character."""
    assert isinstance(error, UnicodeDecodeError)
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class _Leading(Enum):
    """What becomes of the space that sentencepiece puts before the first word."""

    KEPT = 0
    ONE_TAKEN = 1
    ALL_TAKEN = 2


class SentencepieceVocabulary:
    """See `Vocabulary`.

    Args:
        model: the bytes of a tokenizer.model.
        added: tokens looked for in a text before the library sees it; their ids may lie in the model or after it.
        special_ids: tokens without text, besides those that the model calls control tokens.
        prefix, suffix: tokens to add to every text.
        prefixes_all: whether each text between added tokens gets the space before its first word (transformers'
            `legacy`), or only one at the beginning.

    Attributes:
        roles: the names of the tokens that the model has for unknown text, beginning and end.

    Raises RuntimeError if `model` is none.
    """

    def __init__(
        self,
        model: bytes,
        added: Iterable[AddedToken] = (),
        special_ids: Iterable[int] = (),
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        *,
        prefixes_all: bool = True,
    ) -> None:
        self._first = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._later = sp if prefixes_all else sentencepiece.SentencePieceProcessor(model_proto=model + _NO_PREFIX)
        self._prefix, self._suffix = list(prefix), list(suffix)
        self.num_ids = sp.get_piece_size()
        named = {"unk_token": sp.unk_id(), "bos_token": sp.bos_id(), "eos_token": sp.eos_id()}
        self.roles = {role: sp.id_to_piece(token_id) for role, token_id in named.items() if token_id >= 0}
        control = [token_id for token_id in range(self.num_ids) if sp.is_control(token_id)]
        self.special_ids = frozenset(control) | frozenset(special_ids)
        added = tuple(added)
        self._added = {token.content: token.token_id for token in added}
        self._added_bytes = {token_id: content.encode() for content, token_id in self._added.items()}
        self._split = _splitter(added)
        self._leading = self._find_leading()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See `Vocabulary`."""
        ids: list[int] = []
        end = 0
        for found in self._split.finditer(text) if self._split else ():
            ids += self._encode(text[end : found.start()], end == 0)
            ids.append(self._added[found[found.lastindex or 0]])
            end = found.end()
        ids += self._encode(text[end:], end == 0)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Vocabulary`."""
        token_bytes = self._running_bytes()
        return b"".join(token_bytes(token_id) or b"" for token_id in ids).decode(errors=_EACH_BYTE)

    def token_id(self, content: str) -> int | None:
        """See `Vocabulary`."""
        if content in self._added:
            return self._added[content]
        return self._piece_id(content)

    def token_bytes(self, token_id: int) -> bytes | None:
        """See `Vocabulary`."""
        if token_id in self._added_bytes:
            return self._added_bytes[token_id]
        if not 0 <= token_id < self.num_ids:
            return None
        piece = self._first.id_to_piece(token_id)
        if self._first.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if token_id == self._first.unk_id() or token_id in self.special_ids:
            return piece.encode()
        return piece.replace(_SPACE, " ").encode()

    def detokenizer(self, skipped: AbstractSet[int], prompt_ids: Iterable[int]) -> Detokenizer:
        """See `Vocabulary`."""
        prompt = [token for token in prompt_ids if token not in skipped]
        token_bytes = self._running_bytes()
        for token in prompt:
            if token_bytes(token):
                break
        return ByteDetokenizer(token_bytes, skipped, prompt, _EACH_BYTE)

    def _encode(self, text: str, is_first: bool) -> list[int]:
        if not text:
            return []
        ids: list[int] = (self._first if is_first else self._later).encode(text)
        return ids

    def _piece_id(self, content: str) -> int | None:
        token_id: int = self._first.piece_to_id(content)
        return token_id if self._first.id_to_piece(token_id) == content else None

    def _find_leading(self) -> _Leading:
        """What the library's decoder does, tried out on a token that begins with the space."""
        sp = self._first
        for token_id in range(self.num_ids):
            piece = sp.id_to_piece(token_id)
            if len(piece) > 1 and piece.startswith(_SPACE) and not sp.is_control(token_id):
                if sp.decode([token_id]).startswith(" "):
                    return _Leading.KEPT
                alone = self._piece_id(_SPACE)
                if alone is not None and not sp.decode([alone, token_id]).startswith(" "):
                    return _Leading.ALL_TAKEN
                return _Leading.ONE_TAKEN
        return _Leading.KEPT

    def _running_bytes(self) -> Callable[[int], bytes | None]:
        """`token_bytes` for the tokens of one text in turn: the space before the first word is taken away."""
        takes = self._leading is not _Leading.KEPT

        def running(token_id: int) -> bytes | None:
            nonlocal takes
            content = self.token_bytes(token_id)
            if not takes or not content:
                return content
            if content[:1] != b" " or token_id in self._added_bytes or self._first.is_byte(token_id):
                takes = False
                return content
            takes = self._leading is _Leading.ALL_TAKEN and content == b" "
            return content[1:]

        return running


def _splitter(added: Sequence[AddedToken]) -> re.Pattern[str] | None:
    """Finds the longest added token at a place, as one of its groups."""
    longest_first = sorted(added, key=lambda token: len(token.content), reverse=True)
    parts = [
        (r"\s*" if token.lstrip else "") + f"({re.escape(token.content)})" + (r"\s*" if token.rstrip else "")
        for token in longest_first
        if token.content
    ]
    return re.compile("|".join(parts)) if parts else None


def load_sentencepiece(files: TokenizerFiles, path: Path) -> tuple[SentencepieceVocabulary, TokenizerFiles]:
    """Read `path` with what the other files say; also the files, with the model's own roles where they name none.

    Raises CheckpointError.
    """
    where = f"{files.where}/{path.name}"
    model = path.read_bytes()
    try:
        bare = SentencepieceVocabulary(model)
    except RuntimeError as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{where} is not a model the `sentencepiece` library can read: {error}. Download it again, or save a "
            "tokenizer.json beside the weights."
        ) from error
    files = files.with_roles(bare.roles)
    known = {token.content: token for token in files.added}
    for content in files.special - known.keys():
        token_id = bare.token_id(content)
        if token_id is not None:
            known[content] = AddedToken(content, token_id, special=True)
    vocabulary = SentencepieceVocabulary(
        model,
        known.values(),
        {token.token_id for token in known.values() if token.content in files.special},
        _role_ids(files, known, "bos", default=True),  # as transformers' tokenizers of this kind have it
        _role_ids(files, known, "eos", default=False),
        prefixes_all=files.settings.get("legacy") is not False,
    )
    return vocabulary, files


def _role_ids(files: TokenizerFiles, known: Mapping[str, AddedToken], role: str, *, default: bool) -> list[int]:
    token = known.get(files.roles.get(f"{role}_token", ""))
    return [token.token_id] if files.role_added(role, default=default) and token is not None else []
