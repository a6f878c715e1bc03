"""Vocabularies in sentencepiece's own form, `tokenizer.model`, where a checkpoint has no other.

The library encodes what stands between added tokens; decoding is that of its `Decode`, told token by token. Which texts
begin with a space that is not theirs is what transformers makes of the model and of tokenizer_config.json.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from pathlib import Path

import sentencepiece

from podquant.errors import CheckpointError
from podquant.tokenizer.added_tokens import AddedToken, Finder
from podquant.tokenizer.detokenize import ByteDetokenizer, Detokenizer
from podquant.tokenizer.files import TokenizerFiles
from podquant.tokenizer.panics import reason
from podquant.tokenizer.sentencepiece_model import PieceType, SentencepieceModel, with_prefix

_SPACE = "▁"
_EACH_BYTE = "podquant.each_byte"

_LLAMA_CLASSES = {"LlamaTokenizer", "CodeLlamaTokenizer"}
_NOT_LLAMA = {"internlm2", "internlm3", "minicpm3", "ministral", "mistral", "mistral3", "mixtral", "phi3", "phimoe"}
"""Model types whose tokenizer transformers (5.24) builds from tokenizer.model alone, whatever class they name."""


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """sentencepiece shows a replacement character for each byte that is part of no character."""
    assert isinstance(error, UnicodeDecodeError)
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class Prefix(Enum):
    """Which texts get a space before them."""

    NONE = "none"
    FIRST = "the one at the beginning, unless it begins with a space"
    EACH = "each between added tokens, unless it begins with a space"
    EACH_ALWAYS = "each between added tokens, as the library does"


_NEEDED = {
    Prefix.NONE: (False,),
    Prefix.FIRST: (False, True),
    Prefix.EACH: (False, True),
    Prefix.EACH_ALWAYS: (True,),
}
"""Whether the library puts the space, for each processor that a prefix needs."""


class SentencepieceVocabulary:
    """See `Vocabulary`.

    Args:
        model: the bytes of a tokenizer.model.
        prefix: None for what the model says.
        added: tokens looked for in a text before the library sees it; their ids may lie in the model or after it.
        special_ids: tokens without text, besides those that the model calls control tokens.
        before, after: tokens to add to every text.

    Raises RuntimeError or ValueError if `model` is none.
    """

    def __init__(
        self,
        model: bytes,
        prefix: Prefix | None = None,
        added: Iterable[AddedToken] = (),
        special_ids: Iterable[int] = (),
        before: Sequence[int] = (),
        after: Sequence[int] = (),
    ) -> None:
        parsed = SentencepieceModel.parse(model)
        own = Prefix.EACH_ALWAYS if parsed.adds_prefix else Prefix.NONE
        self._prefix = own if prefix is None else prefix
        self._processors = {
            prefixed: sentencepiece.SentencePieceProcessor(model_proto=with_prefix(model, prefixed))
            for prefixed in _NEEDED[self._prefix]
        }
        self._pieces = parsed.pieces
        self._strips_all = parsed.removes_spaces
        self._before, self._after = list(before), list(after)
        self.num_ids = len(parsed.pieces)
        self._ids = {piece: token_id for token_id, (piece, _) in enumerate(parsed.pieces)}
        self.special_ids = frozenset(parsed.ids_of(PieceType.CONTROL)) | frozenset(special_ids)
        added = tuple(added)
        self._added = {token.content: token.token_id for token in added}
        self._names = {token_id: content for content, token_id in self._added.items()}
        self._finder = Finder(added)
        self.longest = self._longest(parsed, added)
        self.dropped = b""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See `Vocabulary`."""
        ids: list[int] = []
        for start, piece, token_id in self._finder.split(text):
            ids += self._encode(piece, start == 0)
            if token_id is not None:
                ids.append(token_id)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Vocabulary`."""
        token_bytes = self._running_bytes()
        return b"".join(token_bytes(token_id) or b"" for token_id in ids).decode(errors=_EACH_BYTE)

    def token_id(self, content: str) -> int | None:
        """See `Vocabulary`."""
        return self._added.get(content, self._ids.get(content))

    def token_bytes(self, token_id: int) -> bytes | None:
        """See `Vocabulary`."""
        name = self._names.get(token_id)
        if name is None:
            if not 0 <= token_id < self.num_ids:
                return None
            name = self._pieces[token_id][0]
            if self._is_byte(token_id):
                return bytes([int(name[3:5], 16)])
        return name.replace(_SPACE, " ").encode()

    def detokenizer(self, skipped: AbstractSet[int], prompt_ids: Iterable[int]) -> Detokenizer:
        """See `Vocabulary`."""
        prompt = [token for token in prompt_ids if token not in skipped]
        token_bytes = self._running_bytes()
        for token in prompt:
            if token_bytes(token):
                break
        return ByteDetokenizer(token_bytes, skipped, prompt, _EACH_BYTE)

    @staticmethod
    def _longest(model: SentencepieceModel, added: Sequence[AddedToken]) -> int | None:
        """See `Vocabulary`."""
        falls_back = len(model.ids_of(PieceType.BYTE)) == 256
        strips = model.removes_spaces or any(token.lstrip or token.rstrip for token in added)
        if strips or model.normalizes or not falls_back:
            return None
        names = (*(piece for piece, _ in model.pieces), *(token.content for token in added))
        return max(len(name.encode()) for name in names)

    def _encode(self, text: str, is_first: bool) -> list[int]:
        if not text:
            return []
        if self._prefix is Prefix.EACH_ALWAYS:
            prefixed = True
        elif text.startswith((" ", _SPACE)):
            prefixed = False
        else:
            prefixed = self._prefix is Prefix.EACH or (self._prefix is Prefix.FIRST and is_first)
        ids: list[int] = self._processors[prefixed].encode(text)
        return ids

    def _is_byte(self, token_id: int) -> bool:
        return 0 <= token_id < self.num_ids and self._pieces[token_id][1] is PieceType.BYTE

    def _running_bytes(self) -> Callable[[int], bytes | None]:
        """`token_bytes` for the tokens of one text in turn: the space before the first word is taken away."""
        takes = self._strips_all or self._prefix is not Prefix.NONE

        def running(token_id: int) -> bytes | None:
            nonlocal takes
            content = self.token_bytes(token_id)
            if not takes or not content:
                return content
            if content[:1] != b" " or self._is_byte(token_id):
                takes = False
                return content
            takes = self._strips_all and content == b" "
            return content[1:]

        return running


def load_sentencepiece(
    files: TokenizerFiles, path: Path, model_type: str | None = None
) -> tuple[SentencepieceVocabulary, TokenizerFiles]:
    """Read `path` with what the other files say; also the files, with the model's own roles where they name none.

    `model_type` is that of config.json. Raises CheckpointError.
    """
    where = f"{files.where}/{path.name}"
    model = path.read_bytes()
    try:
        parsed = SentencepieceModel.parse(model)
        files = files.with_roles(parsed.roles)
        is_llama = _is_llama(files, model_type)
        known = _added_tokens(files, parsed, is_llama)
        vocabulary = SentencepieceVocabulary(
            model,
            _prefix(files, parsed, is_llama),
            known.values(),
            {token.token_id for token in known.values() if token.content in files.special},
            _role_ids(files, known, "bos", default=True),  # as transformers' tokenizers of this kind have it
            _role_ids(files, known, "eos", default=False),
        )
    except BaseException as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{where} is not a model the `sentencepiece` library can read: {reason(error)}. It has {len(model)} bytes, "
            f"beginning with {model[:24]!r}. Copy it again if it is damaged, or save a tokenizer.json beside the "
            "weights."
        ) from error
    return vocabulary, files


def _added_tokens(files: TokenizerFiles, model: SentencepieceModel, is_llama: bool) -> dict[str, AddedToken]:
    """Tokens that are found in a text: those of the files, and control tokens, whose text the library would cut up.

    Tokens that a user of the trainer defined the library finds by itself, but after the space before a text; a Llama's
    stand in its place.
    """
    known = {token.content: token for token in files.added}
    named = {token.token_id for token in files.added}
    kinds = {PieceType.CONTROL, PieceType.USER_DEFINED} if is_llama else {PieceType.CONTROL}
    for token_id, (content, kind) in enumerate(model.pieces):
        if content in files.special or (kind in kinds and token_id not in named):
            known.setdefault(content, AddedToken(content, token_id, content in files.special))
    return known


def _is_llama(files: TokenizerFiles, model_type: str | None) -> bool:
    return files.class_name in _LLAMA_CLASSES and model_type not in _NOT_LLAMA


def _prefix(files: TokenizerFiles, model: SentencepieceModel, is_llama: bool) -> Prefix:
    """As transformers 5.24 has it, save that a model which asks for no prefix gets none unless the settings do."""
    adds, legacy = files.settings.get("add_prefix_space"), files.settings.get("legacy")
    if adds is False or (adds is not True and not model.adds_prefix):
        return Prefix.NONE
    if legacy is False or (is_llama and legacy is not True):
        return Prefix.FIRST
    return Prefix.EACH if is_llama else Prefix.EACH_ALWAYS


def _role_ids(files: TokenizerFiles, known: Mapping[str, AddedToken], role: str, *, default: bool) -> list[int]:
    token = known.get(files.roles.get(f"{role}_token", ""))
    return [token.token_id] if files.role_added(role, default=default) and token is not None else []
