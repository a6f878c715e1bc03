"""Tokenizer files that would take down who loads them: each is an error that names the file, in a moment."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from podquant.errors import PodquantError, RequestError
from podquant.tokenizer.tokenizer import Tokenizer

WORDS: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1, "b": 2}, "unk_token": "[UNK]"},
}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
DIGITS = "9" * 5000


def tokenizer(**changes: Any) -> dict[str, str]:
    return {"tokenizer.json": json.dumps({**WORDS, **changes})}


def beside(**files: Any) -> dict[str, str]:
    """A good tokenizer, with other files."""
    contents = {name: each if isinstance(each, str) else json.dumps(each) for name, each in files.items()}
    return tokenizer() | {f"{name}.{'jinja' if name == 'chat_template' else 'json'}": contents[name] for name in files}


def tekken(*, config: dict[str, Any] | None = None, **changes: Any) -> dict[str, str]:
    content = {
        "config": {"pattern": ".", "default_num_special_tokens": 2, "default_vocab_size": 258, **(config or {})},
        "vocab": [{"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)],
        "special_tokens": [{"rank": 0, "token_str": "<s>"}, {"rank": 1, "token_str": "</s>"}],
        **changes,
    }
    return {"tekken.json": json.dumps(content)}


def ranks(more: str, pattern: str = r"\S+|\s+") -> dict[str, str]:
    lines = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    return {"x.tiktoken": lines + more, "tokenizer_config.json": json.dumps({"pat_str": pattern})}


def merges(vocabulary: str, settings: str = '{"tokenizer_class": "GPT2Tokenizer"}') -> dict[str, str]:
    return {"vocab.json": vocabulary, "merges.txt": "a b\n", "tokenizer_config.json": settings}


BOMBS: dict[str, tuple[dict[str, str], str]] = {
    # the `tokenizers` library panics over these, which is no Exception
    "merges without their token": (
        tokenizer(model={"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}),
        "tokenizer.json",
    ),
    "a template without its token": (tokenizer(post_processor=TEMPLATE), "tokenizer.json"),
    "a charsmap that ends early": (
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}),
        "tokenizer.json",
    ),
    "a charsmap that is none": (
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
        "tokenizer.json",
    ),
    "a pattern that backtracks": (
        tokenizer(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(a+)+$"}}),
        "tokenizer.json",
    ),
    # and refuses these
    "a pattern that is none": (tokenizer(pre_tokenizer={**SPLIT, "pattern": {"Regex": "(("}}), "tokenizer.json"),
    "an unknown token that is not there": (
        tokenizer(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 5}),
        "tokenizer.json",
    ),
    "nested too deeply": ({"tokenizer.json": '{"a":' * 100_000}, "tokenizer.json"),
    "a vocabulary of 2^32": (
        tokenizer(model={"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "a"}),
        "vocabulary has ids up to 4294967295",
    ),
    "settings nested too deeply": (beside(tokenizer_config="[" * 100_000), "tokenizer_config.json"),
    "settings with a long integer": (beside(tokenizer_config=f'{{"a": {DIGITS}}}'), "tokenizer_config.json"),
    "an id of many digits": (
        beside(tokenizer_config={"added_tokens_decoder": {DIGITS[:900]: {"content": "x"}}}),
        "tokenizer_config.json",
    ),
    "a long value for a token": (
        beside(tokenizer_config={"added_tokens_decoder": {"3": ["x" * 1_000_000]}}),
        "tokenizer_config.json",
    ),
    "a long class": (merges("{}", json.dumps({"tokenizer_class": ["x" * 1_000_000]})), "tokenizer_config.json"),
    "an added id of many digits": (beside(added_tokens=f'{{"x": {DIGITS[:90]}}}'), "added_tokens.json"),
    "a long end token": (beside(generation_config={"eos_token_id": ["9" * 1_000_000]}), "generation_config.json"),
    "defaults nested too deeply": (beside(generation_config="[" * 100_000), "generation_config.json"),
    "a template nested too deeply": (beside(chat_template="{{" + "(" * 100_000), "chat_template.jinja"),
    "a template of many ifs": (
        beside(chat_template="{% if a %}" * 3000 + "{% endif %}" * 3000),
        "chat_template.jinja",
    ),
    "a long name of a template": (
        beside(tokenizer_config={"chat_template": {"x" * 900: "y"}}),
        "tokenizer_config.json",
    ),
    "a billion special tokens": (
        tekken(config={"default_num_special_tokens": 10**9, "default_vocab_size": 10**9 + 256}),
        "tekken.json",
    ),
    "fewer special tokens than none": (tekken(config={"default_num_special_tokens": -(10**9)}), "tekken.json"),
    "special tokens that are no list": (tekken(special_tokens=5), "tekken.json"),
    "a version of many digits": (tekken(special_tokens=None, config={"version": DIGITS}), "tekken.json"),
    "a version in other digits": (tekken(special_tokens=None, config={"version": "v²"}), "tekken.json"),
    "a long pattern": (tekken(config={"pattern": "(" * 10_000}), "tekken.json"),
    "tekken nested too deeply": ({"tekken.json": "[" * 100_000}, "tekken.json"),
    "a rank beyond 32 bits": (ranks("YWI= 99999999999\n"), "x.tiktoken"),
    "a rank of 4,000 digits": (ranks(f"YWI= {DIGITS[:4000]}\n"), "x.tiktoken"),
    "a rank of 5,000 digits": (ranks(f"YWI= {DIGITS}\n"), "x.tiktoken"),
    "a pattern of ranks that is none": (ranks("", "(("), "tokenizer_config.json"),
    "a negative id": (merges('{"a": -5}'), "vocab.json"),
    "a class that is a list": (merges('{"a": 0}', '{"tokenizer_class": ["x"]}'), "tokenizer_config.json"),
    "a message without an end": ({"tokenizer.model": "\n\x7f\x7f"}, "tokenizer.model"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_an_error_that_names_its_file(tmp_path: Path, bomb: str) -> None:
    files, expected = BOMBS[bomb]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(PodquantError) as raised:
        Tokenizer.load(tmp_path, {"model_type": ["llama"]}, vocab_size=300, where="m")
    text = str(raised.value)
    assert text.startswith("m")
    assert expected in text
    assert len(text) < 600


def test_the_good_files_that_bombs_are_made_of_load(tmp_path: Path) -> None:
    for number, files in enumerate((tokenizer(), tekken(), ranks(""))):
        place = tmp_path / f"{number}"
        place.mkdir()
        for name, content in files.items():
            (place / name).write_text(content)
        loaded = Tokenizer.load(place, {}, vocab_size=300)
        assert loaded.encode("a b", add_special_tokens=False)


def test_a_text_that_a_vocabulary_cannot_encode_is_the_fault_of_the_request(tmp_path: Path) -> None:
    """It has no token for what it does not know."""
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({**WORDS, "model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}})
    )
    loaded = Tokenizer.load(tmp_path, {}, vocab_size=300)
    assert loaded.encode("a") == [0]
    with pytest.raises(RequestError, match=r"cannot encode this text: .*unk_id"):
        loaded.encode("b")


def test_constants_of_a_template_are_not_computed_while_it_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(WORDS))
    bombs = ("{{ 'a' * 10000000000000 }}", "{{ 'a' | center(10000000000000) }}", "{% set x = [0] * 10000000000000 %}")
    source = "{% if false %}" + "".join(bombs) + "{% endif %}{{ messages[0].role }}"
    (tmp_path / "chat_template.jinja").write_text(source)
    chat = Tokenizer.load(tmp_path, {}, vocab_size=300)
    assert chat.apply_chat_template([{"role": "user", "content": ""}]) == "user"
