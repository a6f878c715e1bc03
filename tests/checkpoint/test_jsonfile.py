from __future__ import annotations

import re

import pytest

from podquant.checkpoint.jsonfile import parse_object
from podquant.errors import CheckpointError


def test_parses_an_object() -> None:
    assert parse_object('{"ä": [1, {"b": null}]}  '.encode(), "f") == {"ä": [1, {"b": None}]}


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"a": "\xff"}', "f: not valid JSON: not UTF-8 at byte 7. Copy it again if it is damaged"),
        (b'{"a": 1', "f: not valid JSON: Expecting"),
        (b"", "f: not valid JSON: Expecting value"),
        (b'{"a": 1, "a": 2}', "f: not valid JSON: duplicate key 'a'"),
        (b'{"a": {"b": 1, "b": 2}}', "f: not valid JSON: duplicate key 'b'"),
        (b'{"a": NaN}', "f: not valid JSON: NaN is not JSON"),
        (b'{"\\ud800": 1}', "f: not valid JSON: half of a surrogate pair"),
        (b'{"a": ' + b"9" * 5000 + b"}", "f: not valid JSON: an integer of 5,000 digits"),
        (b"[" * 200_000, "f: not valid JSON: objects and lists are nested"),
        (b"[1]", "f: expected a JSON object, got list."),
    ],
)
def test_refuses_anything_else(raw: bytes, text: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(text)):
        parse_object(raw, "f")
