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
        (b'{"a": "\xff"}', "f: not UTF-8 at byte 7. The file is damaged: copy it again."),
        (b'{"a": 1', "f: not valid JSON: Expecting"),
        (b"", "f: not valid JSON: Expecting value"),
        (b'{"a": 1, "a": 2}', "f: not valid JSON: duplicate key 'a'"),
        (b'{"a": {"b": 1, "b": 2}}', "f: not valid JSON: duplicate key 'b'"),
        (b'{"a": NaN}', "f: not valid JSON: NaN is not JSON"),
        (b'{"\\ud800": 1}', "f: not valid JSON: 'utf-8' codec can't encode"),
        (b'{"a": ' + b"9" * 5000 + b"}", "f: not valid JSON: Exceeds the limit"),
        (b"[" * 200_000, "f: not valid JSON: maximum recursion depth exceeded"),
        (b"[1]", "f: expected a JSON object, got list."),
    ],
)
def test_refuses_anything_else(raw: bytes, text: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(text)):
        parse_object(raw, "f")
