"""Guesses at what follows a text, from the text itself."""

from __future__ import annotations

from podquant.engine.lookup import Lookup


def test_what_followed_the_last_time_is_a_draft() -> None:
    lookup = Lookup()
    assert lookup.drafts([1, 2, 3], 4) == []
    assert lookup.drafts([1, 2, 3, 4, 1, 2], 4) == [3, 4, 1, 2]
    assert lookup.drafts([1, 2, 3, 4, 1, 2], 2) == [3, 4]
    assert lookup.drafts([1, 2, 3, 4, 1, 2, 9, 1, 2], 1) == [9]  # the latest place
    assert lookup.drafts([1, 2, 3, 4, 1, 2, 9, 1, 2, 3], 2) == [4, 1]  # the longer match
    assert lookup.drafts([1, 2, 3, 4, 1, 2, 9, 1, 2, 3, 8], 2) == []


def test_a_text_that_repeats_itself_is_its_own_draft() -> None:
    assert Lookup().drafts([5] * 4, 3) == [5]
    assert Lookup().drafts([], 3) == []
    assert Lookup().drafts([5], 3) == []
