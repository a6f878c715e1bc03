"""What is told from a JSON text before it is parsed, against what the parser makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podquant.server.json_bounds import MOST_DEPTH, MOST_DIGITS, JsonBoundsError, ValuesLeft, check_bounds

_TEXTS = st.text(alphabet='\\"[]{},:a1é\n')
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | _TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_TEXTS, inner, max_size=5),
    max_leaves=30,
)


def count(value: Any) -> int:
    """Values of a JSON value, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(count, inner))


@given(_VALUES, st.booleans())
def test_no_value_is_missed_and_none_is_seen_in_a_text(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    empty = text.count(b"[]") + text.count(b"{}")  # an opening bracket counts as a value, be there one or not
    assert count(value) <= check_bounds(text, 1 << 30) <= count(value) + empty


@pytest.mark.parametrize("size", [pieces + shift for pieces in (1 << 16, 2 << 16) for shift in range(-6, 6)])
@pytest.mark.parametrize("escape", ['\\"', "\\\\", "\\\\\\\\", '\\\\\\"', "é"])
def test_a_text_cut_anywhere_stays_a_text(size: int, escape: str) -> None:
    text = ('["' + "a" * size + escape + "," * 100 + '", 2]').encode()
    assert check_bounds(text, 1 << 30) == count(json.loads(text)) == 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"[1" + b",1" * 200_000, "more than 1000 values"),
        (b"[[]" + b",[]" * 200_000, "more than 1000 values"),
        (b'{"a":1' + b',"a":1' * 200_000, "more than 1000 values"),
        (b"[" * (MOST_DEPTH + 1), f"nested more than {MOST_DEPTH} deep"),
        (b'{"a":' * (MOST_DEPTH + 1), f"nested more than {MOST_DEPTH} deep"),
        (b"[1" + b"0" * MOST_DIGITS, f"a number of more than {MOST_DIGITS} digits"),
        (b"0." + b"0" * 3 * MOST_DIGITS, f"a number of more than {MOST_DIGITS} digits"),
        (b"1e" + b"9" * 3 * MOST_DIGITS, f"a number of more than {MOST_DIGITS} digits"),
    ],
)
def test_too_much_is_told(text: bytes, problem: str) -> None:
    with pytest.raises(JsonBoundsError, match=problem):
        check_bounds(text, 1000)


def test_texts_may_hold_what_values_may_not() -> None:
    assert check_bounds(b'"' + b"[,{1" * 200_000 + b"9" * 1000 + b'"', 1000) == 1


def test_json_inside_texts_shares_what_is_left() -> None:
    left = ValuesLeft(10)
    left.spend("[1, 2, 3]")
    with pytest.raises(JsonBoundsError, match="more than 6 values"):
        left.spend("[1, 2, 3, 4, 5, 6]")
