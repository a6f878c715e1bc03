"""Tokens that are found in a text before the vocabulary sees it. Knows nothing of files or vocabularies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class AddedToken:
    """One such token.

    Attributes:
        content: as it stands in a text.
        token_id: its id.
        special: without text.
        lstrip, rstrip: takes the white space before, or after it along.
        single_word: only found where no word character stands next to it.
        normalized: found in the text after the vocabulary has normalized it; None where no file says so.
    """

    content: str
    token_id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None


class Finder:
    """Takes a text apart at added tokens, the longest that begins at a place, as the `tokenizers` library does."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens if token.content}
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def split(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        """Pieces of `text` in order: where the text before a token begins, that text, and the token's id.

        The last piece has no token. White space that a token takes along is in no piece.
        """
        start = 0
        for found in self._pattern.finditer(text):
            token = self._tokens[found[0]]
            if found.start() < start or (token.single_word and _within_word(text, *found.span())):
                continue
            before = text[start : found.start()]
            yield start, before.rstrip() if token.lstrip else before, token.token_id
            start = found.end()
            if token.rstrip:
                start = len(text) - len(text[start:].lstrip())
        yield start, text[start:], None


def _within_word(text: str, start: int, end: int) -> bool:
    neighbours = text[start - 1 : start] + text[end : end + 1]
    return re.search(r"\w", neighbours) is not None
