"""Drafts without a second model: what followed the last time these tokens stood here (prompt lookup, n-grams).

Text often repeats itself: code that is edited, documents that are quoted, JSON. Knows nothing of steps or devices.
"""

from __future__ import annotations

from collections.abc import Sequence

_LENGTHS = (3, 2)
"""Tokens that must stand alike for what follows them to be a draft; a longer match counts first."""


class Lookup:
    """The n-grams of one growing text."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_read = 0

    def drafts(self, tokens: Sequence[int], most: int) -> list[int]:
        """What may follow.

        Args:
            tokens: the text so far; that of the last call, and more.
            most: tokens wanted.

        Returns:
            The tokens behind the latest earlier place where the text's last tokens stood, up to `most`; often none.
        """
        end = len(tokens)
        for stop in range(max(self._num_read, 1), end):  # n-grams that something follows
            for length in _LENGTHS:
                if stop >= length:
                    self._ends[tuple(tokens[stop - length : stop])] = stop
        self._num_read = max(self._num_read, end)
        for length in _LENGTHS:
            found = self._ends.get(tuple(tokens[end - length : end])) if end >= length else None
            if found is not None:
                return list(tokens[found : found + most])
        return []
