"""Text from tokens one by one, equal in the end to decoding them all at once. Knows nothing about requests or stopping.

Where a text is the bytes of its tokens in a row, they are decoded as they come.

Elsewhere, decoding each token alone would lose the spaces that sentencepiece puts before words and break characters
whose bytes are spread over tokens. So a short window is decoded: the tokens of the last text shown, for context, and
those after them. Text is held back only while the bytes end inside a UTF-8 character: that character, or with byte
fallback, where an unfinished run of byte tokens decodes to nothing but replacement characters, the run since the last
text.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CHARACTER_BYTES = 4
"""A character has at most so many, a token at least one."""


class Detokenizer(Protocol):
    """Turns the generated tokens of one request into text."""

    def push(self, token: int) -> str:
        """The text that `token` completes; "" if it is special or ends inside a character."""
        ...

    def flush(self) -> str:
        """The text of tokens whose last character was never completed, with replacement characters."""
        ...


class ByteDetokenizer:
    """A `Detokenizer` where a text is the bytes of its tokens in a row.

    Args:
        token_bytes: of the next token of the text; None for an id without a token.
        skipped: special tokens, which have no text.
        prompt_ids: what came before; a character that it begins is shown once it is whole.
        errors: what becomes of bytes that are no UTF-8, as `bytes.decode` names it.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes | None],
        skipped: AbstractSet[int],
        prompt_ids: Iterable[int] = (),
        errors: str = "replace",
    ) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        for token in [token for token in prompt_ids if token not in skipped][-_CHARACTER_BYTES:]:
            self.push(token)

    def push(self, token: int) -> str:
        """See `Detokenizer`."""
        return "" if token in self._skipped else self._decoder.decode(self._token_bytes(token) or b"")

    def flush(self) -> str:
        """See `Detokenizer`."""
        return self._decoder.decode(b"", final=True)


class Decoder(Protocol):
    """What decodes a `WindowDetokenizer`'s window; see `Vocabulary` for the first two."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes | None: ...

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is one of byte fallback, which decodes in one with the bytes around it."""
        ...


class WindowDetokenizer:
    """A `Detokenizer` where only decoding tells the text of tokens.

    Args:
        vocabulary: decodes the window.
        skipped: special tokens, which have no text.
        prompt_ids: what came before; it decides whether the first word begins with a space.

    The deltas of `push` and the last one of `flush` concatenate to what `prompt + generated` decodes to, less what
    `prompt` decodes to.
    """

    def __init__(self, vocabulary: Decoder, skipped: AbstractSet[int], prompt_ids: Iterable[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._skipped = skipped
        self._window = self._context([token for token in prompt_ids if token not in skipped])
        self._num_shown = len(self._window)
        self._shown_length = len(self._decode(self._window))

    def push(self, token: int) -> str:
        """See `Detokenizer`."""
        if token in self._skipped or self._vocabulary.token_bytes(token) is None:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        num_held = 0
        if text.endswith(_REPLACEMENT) and self._ends_inside_character():
            if self._vocabulary.is_byte(token):
                return ""
            num_held = 1  # however many bytes it has, an unfinished character decodes to one replacement character
        delta = text[self._shown_length : len(text) - num_held]
        if delta:
            self._window = self._window[self._num_shown :]
            self._num_shown = len(self._window)
            self._shown_length = len(self._decode(self._window)) - num_held
        return delta

    def flush(self) -> str:
        """See `Detokenizer`."""
        delta = self._decode(self._window)[self._shown_length :]
        self._num_shown = len(self._window)
        self._shown_length += len(delta)
        return delta

    def _decode(self, tokens: list[int]) -> str:
        return self._vocabulary.decode(tokens)

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
        last = self._window[-_CHARACTER_BYTES:]
        decoder.decode(b"".join(self._vocabulary.token_bytes(token) or b"" for token in last))
        return decoder.getstate()[0] != b""
