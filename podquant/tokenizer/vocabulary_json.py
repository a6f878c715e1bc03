"""Vocabularies in Hugging Face's tokenizer.json form."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import tokenizers

from podquant.errors import CheckpointError, PodquantError, RequestError
from podquant.foreign import shown
from podquant.tokenizer.added_tokens import AddedToken
from podquant.tokenizer.detokenize import Detokenizer, WindowDetokenizer
from podquant.tokenizer.files import TokenizerFiles
from podquant.tokenizer.panics import reason

_MANY = 1000
"""Ids whose decoding takes longer than handing Python's lock to another thread and back."""

_TRIAL = "Hello, world! Größe 日本語 \n\t 12345 " + "a" * 64 + "!"
"""Words, signs, digits, white space, letters of several bytes, and what patterns that backtrack stumble over."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


class JsonVocabulary:
    """See `Vocabulary`.

    Args:
        tokenizer: changed: nothing is truncated or padded, and `special` are special.
        special: contents of tokens without text, whatever `tokenizer` flags them as; those it lacks do not matter.
        prefix, suffix: tokens to add to every text, where `tokenizer` adds none of its own.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        special: Collection[str] = (),
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ) -> None:
        # some checkpoints ship the truncation or padding of their last training run
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _flag_special(tokenizer, special)
        self._tokenizer = tokenizer
        adds_none = tokenizer.num_special_tokens_to_add(False) == 0
        self._prefix, self._suffix = (list(prefix), list(suffix)) if adds_none else ([], [])
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        self.num_ids = max(vocabulary.values(), default=-1) + 1
        self.longest = _longest(tokenizer, vocabulary)
        self.dropped = _missing_bytes(vocabulary) if self.longest is not None and _is_by_bytes(tokenizer) else b""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See `Vocabulary`."""
        try:
            # unlike `encode`, which gives the same ids, it lets other threads run
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except BaseException as error:
            raise RequestError(f"The model's tokenizer cannot encode this text: {reason(error)}.") from error
        ids: list[int] = encoding.ids
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Vocabulary`."""
        text: str
        try:
            if len(ids) > _MANY:
                (text,) = self._tokenizer.decode_batch([ids], skip_special_tokens=False)  # lets other threads run
            else:
                text = self._tokenizer.decode(ids, skip_special_tokens=False)
        except BaseException as error:
            raise CheckpointError(f"The model's tokenizer cannot decode these tokens: {reason(error)}.") from error
        return text

    def token_id(self, content: str) -> int | None:
        """See `Vocabulary`."""
        token_id: int | None = self._tokenizer.token_to_id(content)
        return token_id

    def token_bytes(self, token_id: int) -> bytes | None:
        """See `Vocabulary`; told from the token's form, in byte-level BPE or with byte fallback."""
        content = self._tokenizer.id_to_token(token_id)
        if content is None:
            return None
        if match := _BYTE_TOKEN.fullmatch(content):
            return bytes.fromhex(match[1])
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in content)
        except KeyError:
            return content.encode()

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is one of byte fallback, which decodes in one with the bytes around it."""
        return _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "") is not None

    def detokenizer(self, skipped: AbstractSet[int], prompt_ids: Iterable[int]) -> Detokenizer:
        """See `Vocabulary`."""
        return WindowDetokenizer(self, skipped, prompt_ids)


_KEEPS_ALL = {"ByteLevel", "Digits", "Metaspace", "UnicodeScripts"}
"""Ways of splitting a text that drop nothing of it; others do so unless their behaviour is another than `Removed`."""

_COMPOSES = {"NFC": 4, "NFKC": 4}
"""What a text in one of these forms may have had in bytes: U+0390 (2) may have been 7, U+1D7CE (4) becomes 1."""


def _longest(tokenizer: tokenizers.Tokenizer, vocabulary: Mapping[str, int]) -> int | None:
    """See `Vocabulary`."""
    added = tokenizer.get_added_tokens_decoder().values()
    splitters = _steps(tokenizer.pre_tokenizer, "pretokenizers")
    by_bytes = _is_by_bytes(tokenizer) and (not _missing_bytes(vocabulary) or _drops_missing_alone(tokenizer))
    falls_back = getattr(tokenizer.model, "byte_fallback", False) and vocabulary.keys() >= _BYTE_TOKENS
    drops = any(
        each["type"] not in _KEEPS_ALL and each.get("behavior", "Removed") == "Removed" for each in splitters
    ) or any(token.lstrip or token.rstrip for token in added)
    factor = 1
    for each in _steps(tokenizer.normalizer, "normalizers"):
        if each["type"] in _COMPOSES:
            factor *= _COMPOSES[each["type"]]
        elif each["type"] == "Replace":
            replaced = each["pattern"].get("String")
            drops = drops or replaced is None or len(each["content"].encode()) < len(replaced.encode())
        elif each["type"] != "Prepend":
            drops = True
    if drops or not (by_bytes or falls_back):
        return None
    sizes = map(len, vocabulary) if by_bytes else (len(content.encode()) for content in vocabulary)
    return factor * max(*sizes, *(len(token.content.encode()) for token in added), 1)


def _is_by_bytes(tokenizer: tokenizers.Tokenizer) -> bool:
    return any(each["type"] == "ByteLevel" for each in _steps(tokenizer.pre_tokenizer, "pretokenizers"))


def _missing_bytes(vocabulary: Mapping[str, int]) -> bytes:
    """Bytes that have no token: rare ones, where the vocabulary was trained without a token for every one."""
    return bytes(byte for character, byte in _BYTE_OF_CHARACTER.items() if character not in vocabulary)


def _drops_missing_alone(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether bytes without a token are dropped, and no others: none is made of others first, or marked as last."""
    model = tokenizer.model
    is_plain = isinstance(model, tokenizers.models.BPE) and not (
        model.unk_token or model.continuing_subword_prefix or model.end_of_word_suffix
    )
    return is_plain and tokenizer.normalizer is None


def _steps(component: Any, key: str) -> list[dict[str, Any]]:
    """What a normalizer or pre-tokenizer does, one after the other, as tokenizer.json has it."""
    if component is None:
        return []
    state: dict[str, Any] = json.loads(component.__getstate__())
    found, left = [], [state]
    while left:
        step = left.pop(0)
        if step["type"] == "Sequence":
            left = [*step[key], *left]
        else:
            found.append(step)
    return found


def _flag_special(tokenizer: tokenizers.Tokenizer, special: Collection[str]) -> None:
    """Make tokens of the vocabulary special, but leave those alone that are: adding one again resets other flags."""
    added = tokenizer.get_added_tokens_decoder()
    for content in sorted(special):
        token_id = tokenizer.token_to_id(content)
        if token_id is not None and not (token_id in added and added[token_id].special):
            token = added.get(token_id, tokenizers.AddedToken(content, normalized=False))
            token.special = True
            tokenizer.add_special_tokens([token])


def load_json(files: TokenizerFiles, path: Path) -> JsonVocabulary:
    """Read `path` with the tokens that the other files add. Raises CheckpointError."""
    where = f"{files.where}/{path.name}"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        vocabulary = with_added_tokens(tokenizer, files, where)
        _try_out(tokenizer)
    except PodquantError:
        raise
    except BaseException as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{where} is not a tokenizer the `tokenizers` library can read: {reason(error)}. Copy it again if it is "
            "damaged, or take the file that the model came with."
        ) from error
    return vocabulary


def _try_out(tokenizer: tokenizers.Tokenizer) -> None:
    """Let a file that is well formed, and still makes the library panic, do so now."""
    with contextlib.suppress(Exception):  # a text may be one that it cannot encode
        tokenizer.encode_batch_fast([_TRIAL], add_special_tokens=True)
    with contextlib.suppress(Exception):
        tokenizer.decode_batch([list(tokenizer.get_vocab().values())], skip_special_tokens=False)


def with_added_tokens(tokenizer: tokenizers.Tokenizer, files: TokenizerFiles, where: str) -> JsonVocabulary:
    """The vocabulary with what the small files say. Raises CheckpointError where they contradict it."""
    present = tokenizer.get_added_tokens_decoder()
    for token in files.added:
        _add(tokenizer, token, present.get(token.token_id), where)
    for content in files.listed:
        if tokenizer.token_to_id(content) is None:
            tokenizer.add_special_tokens([tokenizers.AddedToken(content, normalized=False, special=True)])
    ends = [_role_ids(tokenizer, files, role) for role in ("bos", "eos")]
    return JsonVocabulary(tokenizer, files.special, *ends)


def _add(tokenizer: tokenizers.Tokenizer, token: AddedToken, present: tokenizers.AddedToken | None, where: str) -> None:
    """Have `token` found in a text as its flags say; added_tokens.json has none, so changes no token that is known."""
    known = tokenizer.token_to_id(token.content)
    if known is not None and (token.normalized is None or known != token.token_id):
        return
    added = tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized is True,
        special=token.special,
    )
    if repr(added) == repr(present):  # == compares the contents alone
        return
    tokenizer.add_tokens([added])
    got = tokenizer.token_to_id(token.content)
    if got != token.token_id:
        raise CheckpointError(
            f"{where}: lacks the token {shown(token.content)}, to which the other tokenizer files give id "
            f"{token.token_id}, but the next free id is {got}. The files are not of one checkpoint: "
            "download them again."
        )


def _role_ids(tokenizer: tokenizers.Tokenizer, files: TokenizerFiles, role: str) -> list[int]:
    token_id = tokenizer.token_to_id(files.roles.get(f"{role}_token", ""))
    return [token_id] if files.role_added(role) and token_id is not None else []
