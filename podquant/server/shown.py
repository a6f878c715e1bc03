"""A value of a request as an error says it back: its beginning, at a cost that does not grow with the value."""

from __future__ import annotations

from itertools import islice
from reprlib import Repr
from typing import Any

_LONGEST = 76


class _Short(Repr):
    def __init__(self) -> None:
        super().__init__(maxlevel=3, maxlist=6, maxdict=4, maxstring=_LONGEST)

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Unlike its parent, in the order that there is: sorting takes all of the keys."""
        if level <= 0:
            return "{...}"
        pieces = [
            f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}"
            for key, value in islice(x.items(), self.maxdict)
        ]
        more = ["..."] if len(x) > len(pieces) else []
        return "{" + ", ".join(pieces + more) + "}"


_SHORT = _Short()


def shown(value: Any) -> str:
    """Up to 80 characters for a value."""
    text = _SHORT.repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
