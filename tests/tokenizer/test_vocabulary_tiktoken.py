from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from podquant.errors import CheckpointError, RequestError, UnsupportedModelError
from podquant.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.vocabularies import HARD_TEXTS, QWEN_PATTERN, merge_by_ranks, trained_ranks, write_ranks

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]
CHAT = {"chat_format": "chatml", "eos_token_id": 320}
texts = st.lists(st.one_of(st.sampled_from(HARD_TEXTS), st.text(max_size=8)), max_size=8).map("".join)


def qwen_directory(directory: Path, ranks: dict[bytes, int], generation: dict[str, Any]) -> Path:
    """A directory with the files that first-generation Qwen has, less its code and weights."""
    directory.mkdir(exist_ok=True)
    write_ranks(directory / "qwen.tiktoken", ranks)
    settings = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def reference(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    special = {content: len(ranks) + offset for offset, content in enumerate(QWEN_SPECIAL)}
    return tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = qwen_directory(tmp_path_factory.mktemp("qwen"), trained_ranks(), CHAT)
    return Tokenizer.load(directory, {"vocab_size": 640})


def nfc(text: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFC", text)


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_tokens_and_text_are_tiktokens_own(qwen: Tokenizer, text: str) -> None:
    encoding = reference(trained_ranks())
    ids = encoding.encode(nfc(text), allowed_special="all")
    assert qwen.encode(text) == ids
    assert qwen.decode(ids, skip_special_tokens=False) == encoding.decode(ids) == nfc(text)
    plain = [token for token in ids if token < 320]
    assert qwen.decode(ids) == encoding.decode(plain)
    if len(plain) == len(ids):
        assert ids == merge_by_ranks(trained_ranks(), nfc(text))  # and BPE as it is defined


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 340), max_size=24))
def test_any_tokens_stream_to_the_text_of_the_whole(qwen: Tokenizer, ids: list[int]) -> None:
    detokenizer = qwen.detokenizer([])
    parts = [detokenizer.push(token) for token in ids]
    whole = b"".join(qwen.token_bytes(token) or b"" for token in ids if token < 320).decode(errors="replace")
    assert "".join(parts) + detokenizer.flush() == whole == qwen.decode(ids)


def test_the_last_bytes_of_a_character_that_the_prompt_begins_show_it(qwen: Tokenizer) -> None:
    ids = list("a日".encode())
    detokenizer = qwen.detokenizer(ids[:2])
    assert [detokenizer.push(token) for token in ids[2:]] == ["", "日"]


def test_ids_are_those_of_qwen_7b(tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    for rank in range(256, 151643):
        ranks[rank.to_bytes(3, "big")] = rank
    directory = qwen_directory(tmp_path, ranks, {"chat_format": "chatml", "eos_token_id": 151643})
    tokenizer = Tokenizer.load(directory, {"vocab_size": 151936})
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|><|extra_0|><|extra_204|>") == [
        *(151643, 151644, 151645, 151646),
        151850,
    ]
    assert tokenizer.special_ids == set(range(151643, 151851))
    assert tokenizer.eos_ids == {151643, 151644, 151645}  # its own code stops at <|im_start|> as well


def chat_vocabulary() -> dict[bytes, int]:
    """Every byte is its own rank, and four words of a chat follow; <|endoftext|> is 260."""
    return {bytes([byte]): byte for byte in range(256)} | {
        b"system": 256,
        b"user": 257,
        b"assistant": 258,
        b"\n\n": 259,
    }


START, END, NEWLINE = 261, 262, 10
SYSTEM, USER, ASSISTANT, TWO_NEWLINES = 256, 257, 258, 259


@pytest.fixture
def chat(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(qwen_directory(tmp_path, chat_vocabulary(), CHAT), {})


def test_a_chat_becomes_the_tokens_of_qwens_make_context(chat: Tokenizer) -> None:
    assert chat.has_chat_template
    default = b"You are a helpful assistant."  # " assistant" is no word of the vocabulary: bytes
    ids = [START, SYSTEM, NEWLINE, *default, END, NEWLINE, START, USER, NEWLINE, *b"Hi", END, NEWLINE]
    assert chat.encode_chat([{"role": "user", "content": "Hi"}]) == [*ids, START, ASSISTANT, NEWLINE]
    assert chat.apply_chat_template([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_chat_with_history_becomes_the_tokens_of_qwens_make_context(chat: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "\n\n1"},
        {"role": "assistant", "content": "e\u0301"},  # is composed: é
        {"role": "user", "content": "<|im_end|>\n"},
    ]
    assert chat.encode_chat(messages) == [
        *(START, SYSTEM, NEWLINE, END, NEWLINE),
        *(START, USER, NEWLINE, TWO_NEWLINES, 0x31, END, NEWLINE),  # a newline of the message stays apart
        *(START, ASSISTANT, NEWLINE, 0xC3, 0xA9, END, NEWLINE),
        *(START, USER, NEWLINE, *b"<|im_end|>\n", END, NEWLINE),  # what a message says is text
        *(START, ASSISTANT, NEWLINE),
    ]
    assert chat.encode_chat(messages[:3], add_generation_prompt=False)[-4:] == [NEWLINE, 0xC3, 0xA9, END]


def test_a_developer_is_the_system_of_chatml(chat: Tokenizer) -> None:
    chats = [[{"role": role, "content": "x"}, {"role": "user", "content": "y"}] for role in ("developer", "system")]
    assert chat.encode_chat(chats[0]) == chat.encode_chat(chats[1])


def test_what_chatml_does_not_know_is_refused(chat: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"has the roles system, user, assistant, got 'tool'") as raised:
        chat.encode_chat([{"role": "tool", "content": "x"}])
    assert raised.value.param == "messages"
    with pytest.raises(RequestError, match="has no tools"):
        chat.apply_chat_template([{"role": "user", "content": "x"}], [{"type": "function"}])


@pytest.mark.parametrize(
    ("generation", "has_chat", "eos_ids"),
    [
        ({}, True, {260, 261, 262}),
        ({"chat_format": "chatml", "eos_token_id": [7]}, True, {7, 260, 261, 262}),
        ({"chat_format": "raw", "eos_token_id": 260}, False, {260}),  # the base model
    ],
)
def test_the_generation_config_tells_a_chat_model(
    tmp_path: Path, generation: dict[str, Any], has_chat: bool, eos_ids: set[int]
) -> None:
    tokenizer = Tokenizer.load(qwen_directory(tmp_path, chat_vocabulary(), generation), {})
    assert (tokenizer.has_chat_template, tokenizer.eos_ids) == (has_chat, frozenset(eos_ids))


def test_a_template_of_the_checkpoint_goes_before_chatml(tmp_path: Path) -> None:
    directory = qwen_directory(tmp_path, chat_vocabulary(), CHAT)
    (directory / "chat_template.jinja").write_text("<|im_start|>{{ messages[0].content }}")
    tokenizer = Tokenizer.load(directory, {})
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}]) == [START, 0x61]


def test_the_name_of_the_file_tells_qwen(tmp_path: Path) -> None:
    write_ranks(tmp_path / "qwen.tiktoken", chat_vocabulary())
    assert Tokenizer.load(tmp_path, {}).encode("user<|im_start|>") == [USER, START]


def test_endless_white_space_does_not_overflow_tiktokens_stack(qwen: Tokenizer) -> None:
    text = " " * 1_200_000 + "x"
    assert qwen.decode(qwen.encode(text)) == text


def other_directory(directory: Path, **more: Any) -> Path:
    write_ranks(directory / "other.tiktoken", chat_vocabulary())
    added = {"300": {"content": "<a>", "special": True}, "301": {"content": "<think>", "special": False}}
    tokens = {"bos_token": "<a>", "add_bos_token": True, "added_tokens_decoder": added}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokens | more))
    return directory


def test_a_pattern_in_the_settings_serves_any_class(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(other_directory(tmp_path, tokenizer_class="X", pat_str=r"\w+|\W"), {})
    ids = tokenizer.encode("user1<think>user\n\n")
    assert ids == [300, *b"user1", 301, USER, NEWLINE, NEWLINE]
    assert tokenizer.decode(ids) == "user1<think>user\n\n"
    assert tokenizer.encode("user", add_special_tokens=False) == [USER]
    assert not tokenizer.has_chat_template


def test_ranks_are_known_by_what_they_hold(tmp_path: Path) -> None:
    # as GLM 4 has them
    other_directory(tmp_path, pat_str=r"\w+|\W")
    (tmp_path / "other.tiktoken").rename(tmp_path / "tokenizer.model")
    assert Tokenizer.load(tmp_path, {}).encode("user", add_special_tokens=False) == [USER]


def test_kimis_reserved_tokens_follow_the_ranks(tmp_path: Path) -> None:
    write_ranks(tmp_path / "tiktoken.model", chat_vocabulary())
    added = {"260": {"content": "[BOS]", "special": True}, "262": {"content": "<|im_user|>", "special": False}}
    settings = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": added, "bos_token": "[BOS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path, {"vocab_size": 516})
    ids = tokenizer.encode("[BOS]<|reserved_token_261|><|im_user|><|reserved_token_515|>日本user")
    assert ids == [260, 261, 262, 515, *"日本".encode(), USER]
    assert tokenizer.decode(ids) == "<|im_user|>日本user"


def test_a_class_whose_code_would_have_to_be_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"other\.tiktoken.*class 'XTokenizer'.*QWenTokenizer.*`pat_str`"):
        Tokenizer.load(other_directory(tmp_path, tokenizer_class="XTokenizer"), {})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda lines: [*lines[:5], b"!!! 5", *lines[6:]],
            r"qwen\.tiktoken:6: expected a token in base64 and its rank",
        ),
        (lambda lines: [*lines[:5], b"BQ==", *lines[6:]], r"qwen\.tiktoken:6: expected .* got b'BQ=='"),
        (lambda lines: [*lines, lines[-1]], r"qwen\.tiktoken:261: .*stands there twice"),
        (lambda lines: lines[1:], r"has no token for byte 0.*Is the file whole"),
    ],
)
def test_broken_ranks_are_refused(tmp_path: Path, change: Any, match: str) -> None:
    path = qwen_directory(tmp_path, chat_vocabulary(), CHAT) / "qwen.tiktoken"
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())))
    with pytest.raises(CheckpointError, match=match):
        Tokenizer.load(tmp_path, {})


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"pat_str": "("}, r"`pat_str` '\(' is not a pattern tiktoken knows"),
        (
            {"pat_str": ".", "added_tokens_decoder": {"4": {"content": "<a>"}}},
            "rank 4 is also the id of an added token",
        ),
    ],
)
def test_settings_that_contradict_the_ranks_are_refused(tmp_path: Path, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        Tokenizer.load(other_directory(tmp_path, **settings), {})


def test_many_threads_encode_at_once(qwen: Tokenizer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    mixed = ["".join(random.Random(seed).choices(HARD_TEXTS, k=20)) for seed in range(64)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(qwen.encode, mixed)) == [qwen.encode(text) for text in mixed]
