"""What strangers wrote: JSON read within bounds, and values cut short enough for a message.

A file of a checkpoint or an artifact may be of any size and shape. What lies outside the bounds here no real one has,
and would take down whoever copies, prints or converts it later. Knows nothing of what the values mean.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Any

MOST_JSON_BYTES = 256 << 20
"""Of a file: the index of a model with 16,000 experts in each of 60 layers has as many."""

_MOST_DEPTH = 64
"""Objects and lists inside one another; Python's own writer of JSON gives up at some 300."""

_MOST_DIGITS = 100
"""Of an integer: tokenizer_config.json has 31 where it means no limit, and more than 308 are no float."""

_MOST_KEY = 1024
"""Characters of a key: names of tensors and modules have some 60."""

_MOST_SHOWN = 80
"""Characters of a value in a message."""

_MOST_WORD = 400
"""Characters without white space in a message: some paths and addresses have as many."""

_LONG_WORD = re.compile(rf"\S{{{_MOST_WORD},}}")

_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
"""How JSON writes half of a surrogate pair, and a whole one."""


def parse_json(data: bytes, *, lenient: bool = False) -> Any:
    """The value in UTF-8 JSON.

    Args:
        lenient: accept duplicate keys, of which the last counts, and NaN and Infinity, as most software does.

    Raises:
        ValueError: it is not JSON, or exceeds the bounds; says what, and where if that is known.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    strictly: Mapping[str, Any] = {} if lenient else {"parse_constant": _no_constant, "parse_float": _finite}
    try:
        value = json.loads(text, object_pairs_hook=_bounded if lenient else _unique, parse_int=_integer, **strictly)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_depth(value)
    if _HALF_PAIR.search(data):
        _check_text(value)
    return value


class _Short(reprlib.Repr):
    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """In the order that there is: sorting, as its parent does, takes long where the keys are many."""
        if level <= 0:
            return "{...}" if x else "{}"
        some = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in islice(x, self.maxdict)]
        return "{" + ", ".join(some + ["..."] * (len(x) > len(some))) + "}"


def shown(value: object, most: int = _MOST_SHOWN) -> str:
    """A value as a message shows it: the beginning of its `repr`, however large it is."""
    if isinstance(value, str | bytes):
        return cut(repr(value[:most]), most)
    if isinstance(value, int) and abs(value) >= 10**_MOST_DIGITS:
        return f"an integer of some {int(value.bit_length() * math.log10(2)):,} digits"
    short = _Short(maxlevel=4, maxdict=16, maxlist=16, maxtuple=16, maxother=most, maxstring=most)
    short.maxlong = most
    return cut(short.repr(value), most)


def cut(text: str, most: int = _MOST_SHOWN) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def cut_words(text: str) -> str:
    """A message in which words of absurd length, such as a flag's value of 4,000 digits, are cut."""
    return _LONG_WORD.sub(lambda found: cut(found[0], _MOST_WORD), text)


_TOO_DEEP = f"objects and lists are nested more than {_MOST_DEPTH} deep"


def _bounded(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, _ in pairs:
        if len(key) > _MOST_KEY:
            raise ValueError(f"a key of {len(key):,} characters, {shown(key)}: at most {_MOST_KEY:,} are accepted")
    return dict(pairs)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = _bounded(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {shown(twice)}")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits: at most {_MOST_DIGITS} are accepted")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {cut(digits)} is too large for a float")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MOST_DEPTH):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for several in inside for each in several if isinstance(each, dict | list)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _check_text(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair, \\u{ord(error.object[error.start]):04x}, is not text") from error
