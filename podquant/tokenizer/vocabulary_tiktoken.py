"""Vocabularies as ranks of byte strings, in tiktoken's text form: a line for each, base64, a space and the rank.

The file says neither how a text is split before merging nor which special tokens there are. Checkpoints keep that in
code, which podquant never runs; so the tokenizer classes it knows are declared here, and for others
tokenizer_config.json has to give the pattern.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tiktoken

from podquant.errors import CheckpointError, RequestError, UnsupportedModelError
from podquant.foreign import cut, shown
from podquant.tokenizer import patterns
from podquant.tokenizer.detokenize import ByteDetokenizer, Detokenizer
from podquant.tokenizer.files import TokenizerFiles
from podquant.tokenizer.panics import reason

_SPACE = re.compile(r"\s+")
_MOST_SPACE = 400_000
"""White space characters in a row that are split at once: from 1e6 on tiktoken's regex engine overflows its stack."""


_MOST_RANK = 2**31 - 1
_ADVICE = "Copy it again if it is damaged, or take the file that the model came with."

_COMPOSED = 4
"""A text in Unicode's form C may have had so many times its bytes: U+0390 (2) may have been 7."""


@dataclass(frozen=True)
class TiktokenClass:
    """What the code of a tokenizer class says beyond its files.

    Attributes:
        pattern: regular expression whose matches are merged one by one.
        names: special tokens, from the first id after the ranks on; those of added tokens come before them.
        form: Unicode normal form a text is brought to, None for none.
        roles: as `TokenizerFiles.roles`, where the files name none.
        chat_format: of the messages of a chat, where neither template nor generation_config.json gives one.
    """

    pattern: str
    names: tuple[str, ...] = ()
    form: Literal["NFC"] | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    chat_format: str | None = None


_CLASSES = {
    # Qwen-7B's tokenization_qwen.py
    "QWenTokenizer": TiktokenClass(
        patterns.QWEN,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))),
        form="NFC",
        roles={"eos_token": "<|endoftext|>"},
        chat_format="chatml",
    ),
    # Kimi-K2's tokenization_kimi.py; its names of reserved tokens hold their ids, see `_special_tokens`
    "TikTokenTokenizer": TiktokenClass(patterns.KIMI, ("<|reserved_token_{id}|>",) * 256),
}
_CLASS_OF_FILE = {"qwen.tiktoken": "QWenTokenizer"}


class TiktokenVocabulary:
    """See `Vocabulary`.

    Args:
        kind: how the text is split.
        ranks: tokens, and their order, which is also their ids.
        added: further tokens, by name.
        special_ids: of these, those without text.
        prefix, suffix: tokens to add to every text.

    Raises ValueError if tiktoken does not know the pattern.
    """

    def __init__(
        self,
        kind: TiktokenClass,
        ranks: Mapping[bytes, int],
        added: Mapping[str, int],
        special_ids: AbstractSet[int] = frozenset(),
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ) -> None:
        self._added = dict(added)
        try:
            self._encoding = tiktoken.Encoding(
                "podquant", pat_str=kind.pattern, mergeable_ranks=dict(ranks), special_tokens=self._added
            )
        except BaseException as error:
            raise ValueError(reason(error)) from error
        self._names = set(added)
        self._form = kind.form
        self._prefix, self._suffix = list(prefix), list(suffix)
        self._bytes = {rank: token for token, rank in ranks.items()}
        self._bytes |= {token_id: content.encode() for content, token_id in added.items()}
        self.num_ids = max(ranks.values()) + 1
        self.longest: int | None = max(map(len, self._bytes.values())) * (1 if kind.form is None else _COMPOSED)
        self.dropped = b""
        self.special_ids = frozenset(special_ids)
        self.chat_format = kind.chat_format

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See `Vocabulary`."""
        ids = self._encode(text, self._names)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text in which no added token is looked for."""
        return self._encode(text, set())

    def decode(self, ids: Sequence[int]) -> str:
        """See `Vocabulary`."""
        return b"".join(self._bytes.get(token_id, b"") for token_id in ids).decode(errors="replace")

    def token_id(self, content: str) -> int | None:
        """See `Vocabulary`."""
        return self._added.get(content)

    def token_bytes(self, token_id: int) -> bytes | None:
        """See `Vocabulary`."""
        return self._bytes.get(token_id)

    def detokenizer(self, skipped: AbstractSet[int], prompt_ids: Iterable[int]) -> Detokenizer:
        """See `Vocabulary`."""
        return ByteDetokenizer(self._bytes.get, skipped, prompt_ids)

    def _encode(self, text: str, added: set[str]) -> list[int]:
        if self._form is not None:
            text = unicodedata.normalize(self._form, text)
        ids: list[int] = []
        for piece in _pieces(text):
            try:
                ids += self._encoding.encode(piece, allowed_special=added, disallowed_special=())
            except BaseException as error:
                raise RequestError(f"The model's tokenizer cannot encode this text: {reason(error)}.") from error
        return ids


def holds_ranks(path: Path) -> bool:
    """Whether a file begins as one of ranks does, whatever its name."""
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(1024)) is not None


def load_tiktoken(files: TokenizerFiles, path: Path) -> tuple[TiktokenVocabulary, TokenizerFiles]:
    """Read `path` with what its class and the other files say; also the files, with the class's roles.

    Raises CheckpointError.
    """
    where = f"{files.where}/{path.name}"
    kind = _class_of(files, path.name, where)
    files = files.with_roles(kind.roles)
    ranks = _read_ranks(path, where)
    tokens, special_ids = _special_tokens(files, kind, max(ranks.values()) + 1)
    taken = sorted(set(tokens.values()) & set(ranks.values()))
    if taken:
        raise CheckpointError(
            f"{where}: rank {taken[0]} is also the id of an added token. The files are not of one checkpoint: "
            "download them again."
        )
    bos, eos = (_role_ids(files, tokens, role) for role in ("bos", "eos"))
    try:
        return TiktokenVocabulary(kind, ranks, tokens, special_ids, bos, eos), files
    except ValueError as error:
        raise CheckpointError(
            f"{files.where}/tokenizer_config.json: `pat_str` {shown(kind.pattern)} is not a pattern tiktoken "
            f"knows: {cut(str(error), 200)}."
        ) from error


def _role_ids(files: TokenizerFiles, tokens: Mapping[str, int], role: str) -> list[int]:
    token_id = tokens.get(files.roles.get(f"{role}_token", ""))
    return [token_id] if files.role_added(role) and token_id is not None else []


def _class_of(files: TokenizerFiles, name: str, where: str) -> TiktokenClass:
    pattern = files.settings.get("pat_str")
    if isinstance(pattern, str) and pattern:
        return TiktokenClass(pattern)
    class_name = files.class_name or _CLASS_OF_FILE.get(name)
    if class_name not in _CLASSES:
        raise UnsupportedModelError(
            f"{where}: how tokenizer class {shown(class_name)} splits a text is not known, as its code is not run. "
            f"Known are {', '.join(_CLASSES)}; for others give the pattern as `pat_str` in tokenizer_config.json, or "
            "save a tokenizer.json beside the weights."
        )
    return _CLASSES[class_name]


def _read_ranks(path: Path, where: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            content, value = base64.b64decode(token, validate=True), int(rank)
        except ValueError as error:
            raise CheckpointError(
                f"{where}:{number}: expected a token in base64 and its rank, got {shown(line)}. {_ADVICE}"
            ) from error
        if content in ranks or value in seen or not 0 <= value <= _MOST_RANK:
            raise CheckpointError(
                f"{where}:{number}: the token {shown(content)} or its rank {shown(value)} stands there twice, or the "
                f"rank is not from 0 to {_MOST_RANK:,}. {_ADVICE}"
            )
        ranks[content] = value
        seen.add(value)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(
            f"{where}: has no token for byte {missing[0]}, but a text may hold any byte. Is the file whole? {_ADVICE}"
        )
    return ranks


def _special_tokens(files: TokenizerFiles, kind: TiktokenClass, first: int) -> tuple[dict[str, int], frozenset[int]]:
    """Added tokens by name, and the ids of those without text."""
    named = {first + offset: name.format(id=first + offset) for offset, name in enumerate(kind.names)}
    added = {token.token_id: token.content for token in files.added}
    tokens = {content: token_id for token_id, content in (named | added).items()}
    without_text = {token_id for content, token_id in tokens.items() if content in files.special}
    return tokens, frozenset(without_text | (named.keys() - added.keys()))


def _pieces(text: str) -> Iterator[str]:
    """The text in one piece, but for white space beyond all measure."""
    start = 0
    if len(text) > _MOST_SPACE:
        for run in _SPACE.finditer(text):
            for cut in range(run.start() + _MOST_SPACE, run.end(), _MOST_SPACE):
                yield text[start:cut]
                start = cut
    yield text[start:]
