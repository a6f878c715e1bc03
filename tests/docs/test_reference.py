"""The reference pages are those that the code gives."""

from __future__ import annotations

import pytest

from tests.docs.generate import PAGES, REFERENCE
from tests.docs.markdown import attributes


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_gives(name: str) -> None:
    committed = (REFERENCE / name).read_text(encoding="utf-8")
    assert committed == PAGES[name](), "run `python -m tests.docs.generate` and commit docs/reference/"


def test_no_other_page_is_there() -> None:
    assert {path.name for path in REFERENCE.iterdir()} == PAGES.keys()


def test_attributes_of_a_docstring() -> None:
    text = """One thing.

    Attributes:
        first, second: in words,
            and more words: of both.
        third: last.

    Raises:
        Nothing: ever.
    """
    assert attributes(text) == {
        "first": "in words, and more words: of both.",
        "second": "in words, and more words: of both.",
        "third": "last.",
    }
