"""Whether a text surely has too many tokens: told from its bytes or its first pieces, before all of it is tokenized.

Tokenizing takes a second or so for each megabyte. Knows nothing of vocabularies or of what a text is for.
"""

from __future__ import annotations

from collections.abc import Callable

_CHARACTERS = 8
"""More than an average token has in any language; pieces of so many for each token allowed are tried first."""


class TooManyTokensError(Exception):
    """A text has more tokens than it may: at least `at_least`."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"a text of at least {at_least} tokens")
        self.at_least = at_least


def check_length(
    text: str, most: int, longest: int | None, count: Callable[[str], int], *, dropped: bytes = b""
) -> None:
    """Raises TooManyTokensError if a text surely has more than `most` tokens; others may still turn out to have more.

    Args:
        longest: bytes of text that one token stands for at the most; None if that is not known.
        count: tokens of a text.
        dropped: bytes that may leave no token.
    """
    if longest is not None:
        _refuse_more(-(-_num_bytes(text, 2 * longest * most, dropped) // longest), most)
    size = _CHARACTERS * (most + 1)
    if len(text) <= 2 * size:
        return
    at_least = 0
    for start in range(0, len(text), size):
        num_tokens = count(text[start : start + size])
        # what is around a piece may change how its ends are cut, and no more
        at_least += max(num_tokens - num_tokens // 8 - 16, 0)
        _refuse_more(at_least, most)


def _num_bytes(text: str, enough: int, dropped: bytes) -> int:
    """The bytes of a text; where some do not count, of those characters that are enough to tell."""
    if dropped:
        return len(text[:enough].encode().translate(None, dropped))
    return len(text) if text.isascii() else len(text.encode())


def _refuse_more(at_least: int, most: int) -> None:
    if at_least > most:
        raise TooManyTokensError(at_least)
