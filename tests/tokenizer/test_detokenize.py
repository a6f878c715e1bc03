from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from podquant.tokenizer.detokenize import WindowDetokenizer
from podquant.tokenizer.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
HARD = [
    "👩‍👩‍👧‍👦",
    "🇩🇪",
    "e\u0301",
    "n\u0303o",
    "日本語",
    "\ufffd",
    " ",
    "  ",
    "hello",
    "the",
    "\n",
    "é",
    "\u200d",
    "ñ",
    "𝄞",
    "\x00",
    "▁",
]
texts = st.lists(st.one_of(st.sampled_from(HARD), st.text(max_size=6)), max_size=12).map("".join)


def deltas(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


def token_id(tokenizer: Tokenizer, content: str) -> int:
    found = tokenizer._vocabulary.token_id(content)
    assert found is not None
    return found


def expected_text(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    return tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


@settings(max_examples=400, deadline=None)
@given(before=texts, text=texts, special=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 1)), max_size=4))
@example(before="", text="hello world", special=[(0, 0)])
@example(before="", text="\ufffd\ufffd\ufffd\ufffd\ufffda", special=[])
@example(before="🇩🇪🇩🇪", text="🇩🇪🇩🇪", special=[])
@example(before="hello ", text=" the", special=[(1, 1), (2, 0)])
def test_deltas_add_up_to_the_whole_text(
    any_tokenizer: Tokenizer, before: str, text: str, special: list[tuple[int, int]]
) -> None:
    prompt = any_tokenizer.encode(before, add_special_tokens=False)
    generated = any_tokenizer.encode(text, add_special_tokens=False)
    for position, which in special:
        generated.insert(position % (len(generated) + 1), token_id(any_tokenizer, ("<s>", "</s>")[which]))
    parts = deltas(any_tokenizer, prompt, generated)
    assert "".join(parts) == expected_text(any_tokenizer, prompt, generated)
    if REPLACEMENT not in any_tokenizer.decode(prompt + generated):
        assert not any(REPLACEMENT in part for part in parts)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_bytes_add_up_in_byte_level_bpe(byte_level_tokenizer: Tokenizer, data: st.DataObject) -> None:
    alphabet = [token_id(byte_level_tokenizer, c) for c in "ðŁĺĢâĤ¬Ãïa¿½"]
    ids = data.draw(st.lists(st.one_of(st.sampled_from(alphabet), st.integers(0, 399)), max_size=24))
    assert "".join(deltas(byte_level_tokenizer, [], ids)) == byte_level_tokenizer.decode(ids)


def test_a_character_is_shown_once_its_last_byte_is_there(any_tokenizer: Tokenizer) -> None:
    ids = any_tokenizer.encode("a😀", add_special_tokens=False)
    parts = deltas(any_tokenizer, [], ids)
    assert [part for part in parts if part] == ["a", "😀"]
    assert parts[-2:] == ["😀", ""]


def test_a_word_keeps_its_space_after_a_prompt_and_loses_it_at_the_beginning(
    byte_fallback_tokenizer: Tokenizer,
) -> None:
    prompt = byte_fallback_tokenizer.encode("hello", add_special_tokens=False)
    word = byte_fallback_tokenizer.encode("hello", add_special_tokens=False)
    assert "".join(deltas(byte_fallback_tokenizer, prompt, word)) == " hello"
    assert "".join(deltas(byte_fallback_tokenizer, [1], word)) == "hello"
    assert "".join(deltas(byte_fallback_tokenizer, [*prompt, 1, 2], word)) == " hello"


def test_an_unfinished_character_is_flushed(any_tokenizer: Tokenizer) -> None:
    ids = any_tokenizer.encode("a😀", add_special_tokens=False)[:-1]
    parts = deltas(any_tokenizer, [], ids)
    assert "".join(parts[:-1]) == "a"
    assert parts[-1] == any_tokenizer.decode(ids)[1:] != ""


def test_characters_are_shown_although_every_token_ends_inside_the_next(byte_level_tokenizer: Tokenizer) -> None:
    lead, rest = (token_id(byte_level_tokenizer, c) for c in "Ãł")
    assert deltas(byte_level_tokenizer, [], [lead, rest, lead, lead]) == ["", "à", "", REPLACEMENT, REPLACEMENT]
    pairs = byte_level_tokenizer.encode("日" * 50, add_special_tokens=False)
    longest_wait = max(
        len(wait)
        for wait in "".join("x" if part else " " for part in deltas(byte_level_tokenizer, [], pairs)[:-1]).split("x")
    )
    assert longest_wait <= 3


def test_ids_without_a_token_have_no_text(byte_level_tokenizer: Tokenizer) -> None:
    # embeddings are often padded beyond the vocabulary
    assert deltas(byte_level_tokenizer, [], [100_000, *byte_level_tokenizer.encode("a")]) == ["", "a", ""]


@pytest.mark.parametrize("text", ["hello world ", "\ufffd", "日"])
def test_the_cost_of_a_token_does_not_grow(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text * 3000, add_special_tokens=False)[:9000]
    detokenizer = any_tokenizer.detokenizer([])
    durations = []
    for start in range(0, len(ids), 100):
        begun = time.perf_counter()
        for token in ids[start : start + 100]:
            detokenizer.push(token)
        durations.append(time.perf_counter() - begun)
    assert min(durations[-10:]) < 5 * max(durations[:10])
    assert len(getattr(detokenizer, "_window", ())) < 16


def test_endless_unfinished_bytes_do_not_pile_up(byte_level_tokenizer: Tokenizer) -> None:
    lead = token_id(byte_level_tokenizer, "ð")
    detokenizer = byte_level_tokenizer.detokenizer([])
    text = "".join(detokenizer.push(lead) for _ in range(2000))
    assert text + detokenizer.flush() == REPLACEMENT * 2000
    assert isinstance(detokenizer, WindowDetokenizer)
    assert len(detokenizer._window) < 16
