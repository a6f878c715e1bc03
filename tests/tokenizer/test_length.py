"""A text that is too long is told from its bytes or its beginning; one that may fit never is."""

from __future__ import annotations

import threading
import unicodedata
from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from podquant.errors import RequestError
from podquant.tokenizer.added_tokens import AddedToken
from podquant.tokenizer.chat_template import ChatTemplate
from podquant.tokenizer.length import TooManyTokensError, check_length
from podquant.tokenizer.tokenizer import Tokenizer
from podquant.tokenizer.vocabulary_json import JsonVocabulary
from podquant.tokenizer.vocabulary_sentencepiece import SentencepieceVocabulary
from podquant.tokenizer.vocabulary_tiktoken import TiktokenClass, TiktokenVocabulary
from tests.tokenizer.conftest import KINDS, byte_fallback, byte_level
from tests.tokenizer.vocabularies import HARD_TEXTS, QWEN_PATTERN, sentencepiece_model, trained_ranks


def count_nothing(text: str) -> int:
    raise AssertionError(f"{len(text)} characters were tokenized")


def at_least(
    text: str, most: int, longest: int | None, count: Callable[[str], int] = count_nothing, dropped: bytes = b""
) -> int | None:
    """How many tokens a refused text has at the least."""
    try:
        check_length(text, most, longest, count, dropped=dropped)
    except TooManyTokensError as error:
        return error.at_least
    return None


def test_bytes_tell_a_text_that_cannot_fit() -> None:
    assert at_least("a" * 100, 10, 10) is None
    assert at_least("a" * 101, 10, 10) == 11
    assert at_least("é" * 50, 10, 10) is None
    assert at_least("é" * 51, 10, 10) == 11


def test_the_beginning_tells_a_text_whose_tokens_are_shorter_than_they_may_be() -> None:
    seen: list[int] = []

    def count(text: str) -> int:
        seen.append(len(text))
        return len(text) // 4

    assert at_least("a" * 1_000_000, 1000, None, count) == 2002 - 250 - 16
    assert seen == [8008]
    assert at_least("a" * 16_000, 1000, None) is None  # not much more than what would be tried first
    assert at_least("a" * 16_017, 1000, None, lambda text: len(text) // 15) is None  # too near to tell


def test_further_pieces_tell_a_text_whose_tokens_are_long() -> None:
    seen: list[int] = []

    def count(text: str) -> int:
        seen.append(len(text))
        return len(text) // 32

    assert at_least(" " * 16_000_000, 1000, None, count) == 5 * (250 - 31 - 16)
    assert seen == [8008] * 5
    assert at_least(" " * 1_000_000, 1000, None, lambda text: 1) is None  # as of one that drops what it does not know


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"unigram"}))
def test_no_token_stands_for_more_than_is_said(kind: str) -> None:
    vocabulary = KINDS[kind]()
    longest = vocabulary.longest
    assert longest is not None

    @given(st.text())
    def holds(text: str) -> None:
        ids = vocabulary.encode(text, add_special_tokens=False)
        assert len(text.encode()) <= longest * len(ids)

    for text in HARD_TEXTS:
        holds = example(text)(holds)
    holds()


def test_bytes_without_a_token_do_not_count() -> None:
    vocabulary = JsonVocabulary(byte_level(is_whole=False))
    longest, dropped = vocabulary.longest, vocabulary.dropped
    assert longest is not None
    assert b"\x04" in dropped

    @given(st.text() | st.text(alphabet="a\x04é\u0301 \x00"))
    def holds(text: str) -> None:
        ids = vocabulary.encode(text, add_special_tokens=False)
        assert len(text.encode().translate(None, dropped)) <= longest * len(ids)
        assert at_least(text, len(ids), longest, lambda text: 0, dropped=dropped) is None

    for text in HARD_TEXTS:
        holds = example(text)(holds)
    holds()
    assert at_least("\x04" * 1_000_000, 10, longest, lambda text: 0, dropped=dropped) is None
    assert at_least("a" * 1_000_000, 10, longest, dropped=dropped) == 20
    composed = byte_level(is_whole=False)
    composed.normalizer = normalizers.NFC()
    assert JsonVocabulary(composed).longest is None  # it may make those bytes of others
    assert changed(lambda each: setattr(each.model, "unk_token", "<unk>"), lambda: byte_level(is_whole=False)) is None


def changed(change: Callable[[tokenizers.Tokenizer], object], base: Callable[[], tokenizers.Tokenizer]) -> int | None:
    tokenizer = base()
    change(tokenizer)
    return JsonVocabulary(tokenizer).longest


def test_where_text_may_vanish_its_bytes_tell_nothing() -> None:
    strips = tokenizers.AddedToken("<|x|>", rstrip=True, normalized=False)
    assert changed(lambda each: each.add_tokens([strips]), byte_level) is None
    removed = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
    assert changed(lambda each: setattr(each, "pre_tokenizer", removed), byte_level) is None
    assert changed(lambda each: setattr(each, "pre_tokenizer", pre_tokenizers.Whitespace()), byte_level) is None
    assert changed(lambda each: setattr(each, "pre_tokenizer", pre_tokenizers.Metaspace()), byte_level) is None
    for form in (normalizers.Strip(), normalizers.Lowercase(), normalizers.Replace("long", "x")):
        tokenizer = byte_level()
        tokenizer.normalizer = form
        assert JsonVocabulary(tokenizer).longest is None
    unknown = tokenizers.Tokenizer.from_str(byte_fallback().to_str().replace("<0x41>", "<0x4I>"))
    assert JsonVocabulary(unknown).longest is None
    model = sentencepiece_model("llama")
    assert SentencepieceVocabulary(model, added=[AddedToken("x", 9, lstrip=True)]).longest is None
    assert SentencepieceVocabulary(sentencepiece_model("unigram")).longest is None
    assert KINDS["unigram"]().longest is None  # the library does not say whether it falls back on bytes


def test_a_text_that_is_composed_may_have_been_longer() -> None:
    plain = changed(lambda each: None, byte_level)
    assert plain is not None
    composed = changed(lambda each: setattr(each, "normalizer", normalizers.NFC()), byte_level)
    assert composed == 4 * plain
    ranks = [TiktokenVocabulary(TiktokenClass(QWEN_PATTERN, form=form), trained_ranks(), {}) for form in (None, "NFC")]
    assert ranks[1].longest == 4 * (ranks[0].longest or 0)
    most = "\u1fbe\u0308\u0341"
    assert (len(most.encode()), len(unicodedata.normalize("NFC", most).encode())) == (7, 2)


def test_a_tokenizer_refuses_what_is_too_long_and_gives_the_same_ids_for_the_rest(any_tokenizer: Tokenizer) -> None:
    text = "Hello world! naïve 日本語 " * 40
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.encode(text, most=len(ids)) == ids
    with pytest.raises(TooManyTokensError) as raised:
        any_tokenizer.encode(text * 1000, most=len(ids))
    assert len(ids) < raised.value.at_least <= 1000 * len(ids)


def isolated_chat(source: str) -> Tokenizer:
    """A tokenizer whose template is rendered in another process."""
    tokenizer = Tokenizer(JsonVocabulary(byte_level()), chat=ChatTemplate(source, {}, "here"))
    tokenizer.isolate_template()
    return tokenizer


def user(content: str) -> dict[str, str]:
    """What a user says."""
    return {"role": "user", "content": content}


def test_a_chat_that_is_surely_too_long_is_not_rendered() -> None:
    fails = "{% if messages[0].content|length > 1000000 %}{{ raise_exception('rendered') }}{% endif %}"
    tokenizer = isolated_chat(fails + "{% for message in messages %}<|{{ message.content|trim }}|>{% endfor %}")
    try:
        with pytest.raises(RequestError, match="rendered"):
            tokenizer.encode_chat([{"role": "assistant", "content": "a " * 1_000_000}], most=1000)
        with pytest.raises(RequestError, match="rendered"):
            tokenizer.encode_chat([user(" " * 2_000_000)], most=1000)  # of which the template leaves nothing
        for said in (["a " * 1_000_000], ["a" * 1_000_001, "b", "c"]):
            with pytest.raises(TooManyTokensError):
                tokenizer.encode_chat([user(each) for each in said], most=1000)
        chat = [user("hello world "), user("a")]
        assert tokenizer.encode_chat(chat, most=1000) == tokenizer.encode("<|hello world|><|a|>")
    finally:
        tokenizer.close()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}",
        "{% for message in messages %}{{ message.content[-1:] }}{% endfor %}",
        "{% for message in messages %}{{ message.content|truncate(9, true, '') }}{% endfor %}",
        "{% if messages|length > 2 %}{{ raise_exception('no') }}{% endif %}{{ messages[1].content }}",
    ],
)
def test_a_template_may_leave_out_what_users_say(template: str) -> None:
    tokenizer = isolated_chat(template)
    try:
        assert len(tokenizer.encode_chat([user("long " * 100_000), user("a")], most=100)) <= 100
    finally:
        tokenizer.close()


def test_a_long_text_does_not_hold_up_other_threads(any_tokenizer: Tokenizer) -> None:
    text = "Hello world! the words are many, " * 15_000
    turns, is_done = 0, threading.Event()

    def encode() -> None:
        any_tokenizer.encode(text)
        is_done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not is_done.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 5
