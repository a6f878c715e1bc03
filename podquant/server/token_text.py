"""How single tokens are written in log-probabilities. Knows nothing of requests."""

from __future__ import annotations

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
        """Its UTF-8 bytes, None where the text does not tell them."""
        text = self.text(token_id)
        return None if self._tokenizer is None or _REPLACEMENT in text else list(text.encode())

    def length(self, token_id: int) -> int:
        """How many characters it adds to a choice's text."""
        if self._tokenizer is None or token_id in self._tokenizer.special_ids:
            return 0
        return len(self.text(token_id))

    def _look_up(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        # the second of two, as sentencepiece drops the space in front of the first
        once = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)[len(once) :]
