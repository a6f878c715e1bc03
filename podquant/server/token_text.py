"""How single tokens are written in log-probabilities, and where they stand in a text. Knows nothing of requests."""

from __future__ import annotations

import codecs

from podquant.tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenText:
    """Text of single tokens: `token_id:123` without a tokenizer. Remembers what it has looked up."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        """The token as it stands inside a text; bytes that are no whole character show as U+FFFD."""
        text = self._known.get(token_id)
        if text is None:
            text = self._known[token_id] = self._look_up(token_id)
        return text

    def data(self, token_id: int) -> list[int] | None:
        """Its UTF-8 bytes, which may be a part of a character; None where they are not known."""
        if self._tokenizer is None:
            return None
        text = self.text(token_id)
        if _REPLACEMENT not in text:
            return list(text.encode())
        data = self._tokenizer.token_bytes(token_id)
        return None if data is None else list(data)

    def shown(self, token_id: int) -> bytes:
        """The bytes that it adds to a choice's text: none for a special token."""
        if self._tokenizer is None or token_id in self._tokenizer.special_ids:
            return b""
        data = self.data(token_id)
        return self.text(token_id).encode() if data is None else bytes(data)

    def _look_up(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        # the second of two, as sentencepiece drops the space in front of the first
        once = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)[len(once) :]


class TextOffsets:
    """Where tokens begin in the text they make, in characters, one after another.

    A token that holds a part of a character begins where that character does.
    """

    def __init__(self, tokens: TokenText, offset: int = 0) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = offset

    def next(self, token_id: int) -> int:
        """The offset of the next token."""
        offset = self._offset
        self._offset += len(self._decoder.decode(self._tokens.shown(token_id)))
        return offset

    def of_prompt(self, token_ids: tuple[int, ...], length: int) -> list[int]:
        """The offsets of tokens whose text has so many characters, from which the next ones count.

        A text loses a space that sentencepiece writes in front of its first token: the surplus is taken off.
        """
        offsets = [self.next(token_id) for token_id in token_ids]
        surplus = max(self._offset - length, 0)
        self._offset = length
        return [max(offset - surplus, 0) for offset in offsets]
