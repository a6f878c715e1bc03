"""How much a JSON text would build, told from its bytes before it is built: values, nesting, digits of a number.

A parser makes millions of objects of 16 MiB, and lets no other thread run until it is done. Here the text is read a
piece at a time. Knows nothing of what the values mean, nor whether they are JSON at all: the parser does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MOST_DEPTH = 100
"""Lists and objects within one another: far from where recursion over them ends."""

MOST_DIGITS = 400
"""Of a number; a float64 has no use for more than 309 before its point."""

_PIECE = 1 << 16
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MOST_DIGITS + 1))
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_OPENING = frozenset(b"[{")


class JsonBoundsError(Exception):
    """A JSON text would build more than it may; says what."""


def check_bounds(text: bytes, most_values: int) -> int:
    """How many values there are, at the most, in UTF-8 that holds JSON.

    Raises JsonBoundsError if that is more than `most_values`, or the text exceeds the bounds above.
    """
    num_values, depth, is_inside, kept = 1, 0, False, b""
    for start in range(0, len(text), _PIECE):
        piece = kept + text[start : start + _PIECE]
        if is_inside and b'"' not in piece:  # all of it is of one text, as most of a long prompt is
            kept = piece[-1:] if _ends_within_escape(piece) else b""
            continue
        piece = piece.replace(rb"\\", b"")
        kept = b"\\" if piece.endswith(b"\\") else b""  # an escape that the cut would part
        piece = piece.removesuffix(b"\\").replace(rb"\"", b"")
        between = piece.split(b'"')
        outside = b'"'.join(between[is_inside::2])
        is_inside ^= len(between) % 2 == 0
        num_values += sum(map(outside.count, (b",", b"[", b"{")))
        if num_values > most_values:
            raise JsonBoundsError(f"more than {most_values} values")
        if _LONG_NUMBER.search(outside):
            raise JsonBoundsError(f"a number of more than {MOST_DIGITS} digits")
        for bracket in outside.translate(None, _ALL_BUT_BRACKETS):
            depth += 1 if bracket in _OPENING else -1
            if depth > MOST_DEPTH:
                raise JsonBoundsError(f"lists and objects nested more than {MOST_DEPTH} deep")
    return num_values


def _ends_within_escape(piece: bytes) -> bool:
    return (len(piece) - len(piece.rstrip(b"\\"))) % 2 == 1


@dataclass
class ValuesLeft:
    """Of the values that one body may hold: how many more JSON inside its texts may add."""

    number: int

    def spend(self, text: str) -> None:
        """Take off those of a text. Raises JsonBoundsError if it has more than are left."""
        self.number -= check_bounds(text.encode(errors="replace"), self.number)
