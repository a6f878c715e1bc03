from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from podquant.errors import CheckpointError
from podquant.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.vocabularies import HARD_TEXTS, SENTENCEPIECE, sentencepiece_model

texts = st.lists(st.one_of(st.sampled_from(HARD_TEXTS), st.text(max_size=8)), max_size=8).map("".join)
CONTROL = ("<s>", "</s>", "<pad>", "[INST]", "[/INST]")
ROLES: dict[str, Any] = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": {"content": "</s>"}}


def directory_of(path: Path, kind: str = "llama", **tokenizer_config: Any) -> Path:
    (path / "tokenizer.model").write_bytes(sentencepiece_model(kind))
    if tokenizer_config:
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return path


def processor(kind: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(kind))


@pytest.fixture(scope="module", params=list(SENTENCEPIECE))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    # no token is named, so that nothing is looked for in a text, as the library itself does
    nothing = dict.fromkeys(("unk_token", "bos_token", "eos_token"))
    return Tokenizer.load(directory_of(tmp_path_factory.mktemp("model"), kind, **nothing), {})


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_tokens_and_text_are_the_librarys_own(loaded: Tokenizer, kind: str, text: str) -> None:
    sp = processor(kind)
    for name in CONTROL:  # the library cuts them up
        text = text.replace(name, "")
    ids = sp.encode(text)
    assert loaded.encode(text) == ids
    if sp.unk_id() not in ids:  # the library writes " ⁇ " for it
        assert loaded.decode(ids) == sp.decode(ids)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_tokens_stream_to_the_librarys_text(loaded: Tokenizer, kind: str, data: st.DataObject) -> None:
    sp = processor(kind)
    space = sp.piece_to_id("▁")
    one = st.one_of(st.integers(0, len(sp) - 1), st.sampled_from([space, space, 0xF0 + 3, 0x9F + 3, 1, 2]))
    ids = [token for token in data.draw(st.lists(one, max_size=20)) if token < len(sp) and token != sp.unk_id()]
    num_prompt = data.draw(st.integers(0, len(ids)))

    def text_of(some: list[int]) -> str:
        return str(sp.decode([token for token in some if not sp.is_control(token)]))

    assert loaded.decode(ids) == text_of(ids)
    detokenizer = loaded.detokenizer([])
    shown = ""
    for count, token in enumerate(ids, start=1):
        shown += detokenizer.push(token)
        assert text_of(ids[:count]).rstrip("\ufffd") == shown.rstrip("\ufffd")
    assert shown + detokenizer.flush() == text_of(ids)
    prompt = text_of(ids[:num_prompt])
    if not prompt.endswith("\ufffd"):
        detokenizer = loaded.detokenizer(ids[:num_prompt])
        rest = "".join(detokenizer.push(token) for token in ids[num_prompt:]) + detokenizer.flush()
        assert prompt + rest == text_of(ids)


def test_unknown_text_has_no_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(directory_of(tmp_path, "unigram"), {})
    ids = tokenizer.encode("the😀dog", add_special_tokens=False)
    assert 0 in ids
    assert tokenizer.decode(ids) == "thedog"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the<unk>dog"


def pieces_of(directory: Path, text: str, config: dict[str, Any] | None = None) -> list[str]:
    """What the tokens of a text stand for: `▁` for a space, control tokens by name."""
    tokenizer = Tokenizer.load(directory, config or {})
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [(tokenizer.token_bytes(token_id) or b"").decode().replace(" ", "▁") for token_id in ids]


def test_special_tokens_are_found_in_text_and_left_out_of_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(directory_of(tmp_path, **ROLES), {"vocab_size": 420})
    sp = processor("llama")
    ids = tokenizer.encode("<s>hello</s> world<0x0A>")
    # each text between them begins with a space of its own, and bytes are not found by name
    assert ids == [1, 1, *sp.encode("hello"), 2, *sp.encode(" world<0x0A>")]
    assert sp.encode("<0x0A>")[-1] != 3 + 0x0A
    assert tokenizer.decode(ids) == "hello  world<0x0A>"
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == "<s> hello</s>  world<0x0A>"
    assert (tokenizer.eos_ids, tokenizer.special_ids) == (frozenset({2}), frozenset({0, 1, 2}))


LLAMA = {"tokenizer_class": "LlamaTokenizer"}


@pytest.mark.parametrize(
    ("settings", "model_type", "begins"),
    [
        # what the texts "a", " a" and "<s>a", "<s> a" begin with after the token
        ({}, None, ("▁a", "▁▁a", "▁a", "▁▁a")),
        ({"legacy": True}, "mistral", ("▁a", "▁▁a", "▁a", "▁▁a")),
        (LLAMA | {"legacy": True}, "mistral", ("▁a", "▁▁a", "▁a", "▁▁a")),
        ({"legacy": False}, "mistral", ("▁a", "▁a", "a", "▁a")),
        (LLAMA, "mistral", ("▁a", "▁▁a", "▁a", "▁▁a")),
        (LLAMA, "llama", ("▁a", "▁a", "a", "▁a")),
        (LLAMA | {"legacy": None}, "llama", ("▁a", "▁a", "a", "▁a")),
        (LLAMA | {"legacy": False}, "llama", ("▁a", "▁a", "a", "▁a")),
        (LLAMA | {"legacy": True}, "llama", ("▁a", "▁a", "▁a", "▁a")),
        (LLAMA | {"add_prefix_space": False}, "llama", ("a", "▁a", "a", "▁a")),
    ],
)
def test_texts_get_the_space_that_transformers_puts_before_them(
    tmp_path: Path, settings: dict[str, Any], model_type: str | None, begins: tuple[str, ...]
) -> None:
    directory = directory_of(tmp_path, **ROLES, **settings)
    texts = ("a", " a", "<s>a", "<s> a")
    pieces = [pieces_of(directory, text, {"model_type": model_type}) for text in texts]
    assert tuple("".join(each).removeprefix("<s>") for each in pieces) == begins


def test_a_model_without_a_space_before_texts_gets_none(tmp_path: Path) -> None:
    directory = directory_of(tmp_path, "gemma", tokenizer_class="GemmaTokenizer")
    assert "".join(pieces_of(directory, "a<s>a")) == "a<s>a"
    tokenizer = Tokenizer.load(directory, {})
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"
    directory = directory_of(tmp_path, "gemma", tokenizer_class="LlamaTokenizer", add_prefix_space=True)
    assert "".join(pieces_of(directory, "a")) == "▁a"


@pytest.mark.parametrize("settings", [{}, {"legacy": False}, {"tokenizer_class": "LlamaTokenizer"}])
def test_control_tokens_are_found_without_being_named(tmp_path: Path, settings: dict[str, Any]) -> None:
    directory = directory_of(tmp_path, "mistral", **settings)
    ids = Tokenizer.load(directory, {}).encode("[INST] hello [/INST][TOOL_CALLS]", add_special_tokens=False)
    assert [ids[0], *ids[-2:]] == [3, 4, 5]
    assert Tokenizer.load(directory, {}).special_ids == {0, 1, 2, 3, 4, 5}


def test_tokens_that_a_user_of_the_trainer_defined_are_found(tmp_path: Path) -> None:
    text = "<start_of_turn>user\n\n  hello<s><start_of_turn>"
    tokenizer = Tokenizer.load(directory_of(tmp_path, "gemma"), {})
    ids = tokenizer.encode(text, add_special_tokens=False)
    turn = tokenizer._vocabulary.token_id("<start_of_turn>")
    assert (ids[0], ids[-2:]) == (turn, [2, turn])
    assert tokenizer.decode(ids) == text.replace("<s>", "")
    # a Llama's stand at the beginning of a text, without a space before them
    directory = directory_of(tmp_path, "gemma", tokenizer_class="LlamaTokenizer", add_prefix_space=True)
    assert pieces_of(directory, text)[0] == "<start_of_turn>"


def test_runs_of_spaces_show_as_spaces(tmp_path: Path) -> None:
    # Gemma names them among its added tokens
    added = {"5": {"content": "▁▁", "special": False}}
    directory = directory_of(tmp_path, "gemma", added_tokens_decoder=added, tokenizer_class="GemmaTokenizer")
    tokenizer = Tokenizer.load(directory, {})
    ids = tokenizer.encode("  x", add_special_tokens=False)
    assert ids[0] == 5
    assert tokenizer.decode(ids) == "  x"


def test_only_one_space_before_a_text_is_taken_away(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(directory_of(tmp_path), {})
    for text in ("hello", " hello", "   hello", " ", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == [1]


@pytest.mark.parametrize(
    ("more", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"bos_token": None}, [], []),
    ],
)
def test_the_settings_say_which_tokens_are_added(
    tmp_path: Path, more: dict[str, Any], before: list[int], after: list[int]
) -> None:
    tokenizer = Tokenizer.load(directory_of(tmp_path, **(ROLES | more)), {})
    plain = processor("llama").encode("hello")
    assert tokenizer.encode("hello") == [*before, *plain, *after]
    assert tokenizer.encode("hello", add_special_tokens=False) == plain


def test_a_model_without_settings_brings_its_own_roles(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(directory_of(tmp_path, "gemma"), {})
    assert tokenizer.encode("hello<eos>")[0] == 2
    assert tokenizer.eos_ids == {1}
    assert tokenizer.special_ids >= {0, 1, 2, 3}


def test_added_tokens_follow_the_model(tmp_path: Path) -> None:
    directory = directory_of(tmp_path, **ROLES, chat_template="{{ bos_token }}<|im_start|>{{ messages[0].content }}")
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 421, "<|im_start|>": 420, "<|im|>": 422}))
    (directory / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|im_end|>"]}))
    tokenizer = Tokenizer.load(directory, {"vocab_size": 432})
    sp = processor("llama")
    ids = tokenizer.encode("<|im_start|>user\n<|im_end|><|im|>", add_special_tokens=False)
    assert ids == [420, *sp.encode("user\n"), 421, 422]
    assert tokenizer.decode(ids) == "<|im_start|> user\n<|im|>"
    detokenizer = tokenizer.detokenizer(ids[:1])
    assert "".join(detokenizer.push(token) for token in ids[1:]) == " user\n<|im|>"
    assert tokenizer.encode_chat([{"role": "user", "content": "hello"}]) == [1, 420, *sp.encode("hello")]


def test_added_tokens_take_white_space_along_as_they_say(tmp_path: Path) -> None:
    added = {"420": {"content": "<|user|>", "rstrip": True}, "421": {"content": "<mask>", "lstrip": True}}
    tokenizer = Tokenizer.load(directory_of(tmp_path, added_tokens_decoder=added, **ROLES), {})
    sp = processor("llama")
    assert tokenizer.encode("a <|user|> \n b  <mask> c", add_special_tokens=False) == [
        *(*sp.encode("a "), 420),
        *(*sp.encode("b"), 421),
        *sp.encode(" c"),
    ]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda model: b"version https://git-lfs", "wire type|fields of the wrong kind|ends"),
        (lambda model: model[:3000], r"It has 3000 bytes, beginning with b'\\n"),
        (lambda model: b"", r"Model|It has 0 bytes"),
    ],
)
def test_a_broken_model_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], match: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(damage(sentencepiece_model("llama")))
    with pytest.raises(
        CheckpointError, match=rf"tokenizer\.model is not a model the `sentencepiece` library can read.*({match})"
    ):
        Tokenizer.load(tmp_path, {})


def test_a_class_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: expected `tokenizer_class` to be a text"):
        Tokenizer.load(directory_of(tmp_path, tokenizer_class=7), {})
