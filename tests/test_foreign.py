"""JSON from strangers, and what messages show of it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from podquant.foreign import cut, parse_json, shown


def nested(depth: int) -> bytes:
    return b'{"a":' * (depth - 1) + b"[]" + b"}" * (depth - 1)


def test_takes_what_files_hold() -> None:
    assert parse_json('{"ä": [1, {"b": null}], "c": -1.5e3, "d": "\\ud83d\\ude00"}  '.encode()) == {
        "ä": [1, {"b": None}],
        "c": -1500.0,
        "d": "😀",
    }
    assert parse_json(b'{"model_max_length": 1000000000000000019884624838656}')["model_max_length"] > 1 << 64
    assert parse_json(b"3") == 3
    assert json.dumps(parse_json(nested(64)), indent=1)


def test_lenient_takes_what_python_takes() -> None:
    assert parse_json(b'{"a": 1, "a": Infinity}', lenient=True) == {"a": float("inf")}


BOMBS = {
    "objects and lists are nested more than 64 deep": [nested(65), nested(900), b"[" * 200_000, b'{"a":' * 100_000],
    "an integer of 5,000 digits: at most 100 are accepted": [b"9" * 5000, b'{"a": [' + b"9" * 5000 + b"]}"],
    "an integer of 4,000 digits": [b"9" * 4000],
    "a key of 10,000,000 characters, 'xxxx": [b'{"' + b"x" * 10_000_000 + b'": 1}'],
    "half of a surrogate pair, \\udc00, is not text": [b'["\\udc00"]', b'{"\\uDC00": 1}', b'{"a": {"b": "\\udc00x"}}'],
}


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("text", BOMBS)
def test_refuses_bombs(text: str, lenient: bool) -> None:
    for data in BOMBS[text]:
        with pytest.raises(ValueError, match=re.escape(text)) as raised:
            parse_json(data, lenient=lenient)
        assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": 1', "Expecting"),
        (b'{"a": {"b": 1, "b": 2}}', "duplicate key 'b'"),
        (b"[NaN]", "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"[1e999]", "the number 1e999 is too large for a float"),
    ],
)
def test_refuses_what_is_not_json(data: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        parse_json(data)


def test_shows_the_beginning_of_anything() -> None:
    values: list[Any] = [
        "x" * 10_000_000,
        b"x" * 10_000_000,
        10**4000,
        -(10**10_000),
        list(range(1_000_000)),
        {str(number): "y" * 1000 for number in range(1000)},
        [[[[["x" * 1000] * 100] * 100] * 100] * 100],
        ("x" * 1000,),
        1e300,
    ]
    for value in values:
        assert len(shown(value)) <= 80
    assert shown(10**4000) == "an integer of some 4,000 digits"


def test_shows_what_is_short_as_it_is() -> None:
    for value in ("a", b"a", 1, 10**90 // 3, None, True, [1, "b"], {"a": [1.5, {"b": None}]}):
        assert shown(value, 100) == repr(value)
    assert shown("x" * 100) == "'" + "x" * 76 + "..."
    assert (cut("x" * 80), cut("x" * 81)) == ("x" * 80, "x" * 77 + "...")
