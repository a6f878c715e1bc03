"""Names of pages."""

from __future__ import annotations

from podquant.engine.prefix import PageKeys


def keys(tokens: list[int], salt: str = "", count: int = 3) -> list[bytes]:
    return PageKeys(2, salt).of(tokens, count)


def test_a_key_tells_all_tokens_up_to_its_page_and_the_salt() -> None:
    tokens = [5, 6, 7, 8, 9, 10]
    found = keys(tokens)
    assert len(set(found)) == 3
    assert keys([*tokens, 11]) == found
    assert keys([5, 6, 0, 8, 9, 10])[0] == found[0]
    assert not {*keys([5, 6, 0, 8, 9, 10])[1:]} & {*found}
    assert not {*keys([0, *tokens[1:]])} & {*found}
    assert not {*keys(tokens, "salt")} & {*found}
    assert keys([5, 6, 5, 6], count=2)[0] != keys([5, 6, 5, 6], count=2)[1]


def test_keys_are_the_same_asked_for_page_by_page() -> None:
    tokens = [1, 2, 3]
    grown = PageKeys(2, "")
    first = grown.of(tokens, 1)
    tokens += [4, 5, 6]
    assert grown.of(tokens, 3) == keys(tokens)
    assert grown.of(tokens, 1) == first == keys(tokens, count=1)


def test_half_a_surrogate_pair_is_a_salt() -> None:
    assert keys([1, 2, 3, 4], "\ud800", 2) != keys([1, 2, 3, 4], "", 2)
