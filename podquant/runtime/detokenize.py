"""Text from tokens one by one, equal in the end to decoding them all at once. Knows nothing about requests or stopping.

Decoding each token alone would lose the spaces that sentencepiece puts before words and break characters whose bytes
are spread over tokens. So a short window is decoded instead: the tokens of the last text shown, for context, and those
after them. Text is held back only while the bytes end inside a UTF-8 character: that character, or with byte fallback,
where an unfinished run of byte tokens decodes to nothing but replacement characters, the run since the last text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Set

import tokenizers

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


class IncrementalDetokenizer:
    """Turns the generated tokens of one request into text.

    Args:
        tokenizer: decodes the window.
        skipped: special tokens, which have no text.
        prompt_ids: what came before; it decides whether the first word begins with a space.

    The deltas of `push` and the last one of `flush` concatenate to what `prompt + generated` decodes to, less what
    `prompt` decodes to.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, skipped: Set[int], prompt_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._window = self._context([token for token in prompt_ids if token not in skipped])
        self._num_shown = len(self._window)
        self._shown_length = len(self._decode(self._window))

    def push(self, token: int) -> str:
        """The text that `token` completes; "" if it is special or ends inside a character."""
        if token in self._skipped or self._tokenizer.id_to_token(token) is None:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        num_held = 0
        if text.endswith(_REPLACEMENT) and self._ends_inside_character():
            if _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token) or ""):
                return ""
            num_held = 1  # however many bytes it has, an unfinished character decodes to one replacement character
        delta = text[self._shown_length : len(text) - num_held]
        if delta:
            self._window = self._window[self._num_shown :]
            self._num_shown = len(self._window)
            self._shown_length = len(self._decode(self._window)) - num_held
        return delta

    def flush(self) -> str:
        """The text of tokens whose last character was never completed, with replacement characters."""
        delta = self._decode(self._window)[self._shown_length :]
        self._num_shown = len(self._window)
        self._shown_length += len(delta)
        return delta

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def _context(self, prompt: list[int]) -> list[int]:
        """The end of the prompt from the last token on that has text by itself, so begins where a character does."""
        for start in range(len(prompt) - 1, -1, -1):
            text = self._decode([prompt[start]])
            if text and _REPLACEMENT not in text:
                return prompt[start:]
        return prompt

    def _ends_inside_character(self) -> bool:
        """Whether more bytes could complete the last character; a replacement character may also be there for good."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # a character has at most four bytes, a token at least one
        decoder.decode(b"".join(self._bytes(token) for token in self._window[-4:]))
        return decoder.getstate()[0] != b""

    def _bytes(self, token: int) -> bytes:
        """The bytes a token stands for, in byte-level BPE or with byte fallback."""
        content = self._tokenizer.id_to_token(token) or ""
        if match := _BYTE_TOKEN.fullmatch(content):
            return bytes.fromhex(match[1])
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in content)
        except KeyError:
            return content.encode()
