from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podquant.errors import CheckpointError, RequestError
from podquant.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.conftest import SPECIAL


@pytest.fixture
def checkpoint(tmp_path: Path, byte_level_tokenizer: Tokenizer) -> Path:
    """A directory with a tokenizer whose special tokens are `<unk>` 0, `<s>` 1 and `</s>` 2."""
    vocabulary: Any = byte_level_tokenizer._vocabulary
    vocabulary._tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(directory: Path, name: str, value: dict[str, Any]) -> None:
    (directory / name).write_text(json.dumps(value))


@settings(max_examples=200, deadline=None)
@given(text=st.text().filter(lambda text: not any(name in text for name in SPECIAL)))
def test_any_text_survives_byte_level_bpe(byte_level_tokenizer: Tokenizer, text: str) -> None:
    assert byte_level_tokenizer.decode(byte_level_tokenizer.encode(text)) == text


def test_special_tokens_are_found_in_text_and_left_out_of_it(byte_level_tokenizer: Tokenizer) -> None:
    ids = byte_level_tokenizer.encode("<s>a</s>", add_special_tokens=False)
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 3)
    assert byte_level_tokenizer.decode(ids) == "a"
    assert byte_level_tokenizer.decode(ids, skip_special_tokens=False) == "<s>a</s>"


def test_special_tokens_are_added_on_demand(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    content["post_processor"] = {"type": "TemplateProcessing", "single": template, "pair": [], "special_tokens": tokens}
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    write(checkpoint, "tokenizer.json", content)
    tokenizer = Tokenizer.load(checkpoint, {})
    with_special, without = tokenizer.encode("xyz" * 9), tokenizer.encode("xyz" * 9, add_special_tokens=False)
    assert with_special == [1, *without]
    assert tokenizer.decode(without) == "xyz" * 9  # not truncated to what the file says


@pytest.mark.parametrize(
    ("config", "generation_config", "tokenizer_config", "eos_ids"),
    [
        ({}, {}, {}, set()),
        ({"eos_token_id": 7}, {"eos_token_id": [8, 9]}, {"eos_token": "</s>"}, {2, 7, 8, 9}),
        ({"eos_token_id": None}, {"eos_token_id": 8}, {"eos_token": {"content": "</s>"}}, {2, 8}),
        ({"eos_token_id": [0]}, {}, {"eos_token": "not in the vocabulary"}, {0}),
    ],
)
def test_end_tokens_come_from_every_file(
    checkpoint: Path,
    config: dict[str, Any],
    generation_config: dict[str, Any],
    tokenizer_config: dict[str, Any],
    eos_ids: set[int],
) -> None:
    write(checkpoint, "generation_config.json", generation_config)
    write(checkpoint, "tokenizer_config.json", tokenizer_config)
    assert Tokenizer.load(checkpoint, config).eos_ids == eos_ids


def test_a_token_named_special_is_special_whatever_its_flag(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["added_tokens"][2]["special"] = False
    write(checkpoint, "tokenizer.json", content)
    assert Tokenizer.load(checkpoint, {}).special_ids == {0, 1}
    write(checkpoint, "special_tokens_map.json", {"eos_token": "</s>"})
    tokenizer = Tokenizer.load(checkpoint, {})
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2]) == "a"


def test_a_chat_template_is_read_with_the_names_of_special_tokens(checkpoint: Path) -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    write(checkpoint, "tokenizer_config.json", {**tokens, "chat_template": source})
    tokenizer = Tokenizer.load(checkpoint, {})
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<s>hi</s>"
    (checkpoint / "chat_template.jinja").write_text("file {{ messages | length }}")
    assert Tokenizer.load(checkpoint, {}).apply_chat_template([{"role": "user", "content": "hi"}]) == "file 1"


def test_several_chat_templates_are_told_apart_by_name(checkpoint: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write(checkpoint, "tokenizer_config.json", {"chat_template": named})
    tokenizer = Tokenizer.load(checkpoint, {})
    assert [tokenizer.apply_chat_template([], tools) for tools in (None, [{"name": "clock"}])] == ["plain", "tools"]


def test_messages_without_a_chat_template_are_refused(checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint, {})
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match=r"no chat template.*Use /v1/completions") as raised:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert raised.value.param == "messages"


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing.*save_pretrained"):
        Tokenizer.load(tmp_path, {})


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer the `tokenizers` library can read"):
        Tokenizer.load(tmp_path, {})


@pytest.mark.parametrize(
    ("content", "match"),
    [("{", r"tokenizer_config\.json is not valid JSON"), ("[]", "expected a JSON object, got list")],
)
def test_broken_settings_are_refused(checkpoint: Path, content: str, match: str) -> None:
    (checkpoint / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=match):
        Tokenizer.load(checkpoint, {})


def test_added_tokens_that_the_vocabulary_lacks_are_added(checkpoint: Path) -> None:
    added = {"378": {"content": "<tool>", "special": False}, "377": {"content": "<pad>", "special": True}}
    write(checkpoint, "tokenizer_config.json", {"added_tokens_decoder": added | {"1": {"content": "<s>"}}})
    write(checkpoint, "added_tokens.json", {"<|end|>": 379, "<tool>": 378})
    write(checkpoint, "special_tokens_map.json", {"additional_special_tokens": ["<|end|>"]})
    tokenizer = Tokenizer.load(checkpoint, {"vocab_size": 380})
    assert tokenizer.encode("<pad><tool><|end|>") == [377, 378, 379]
    assert tokenizer.decode([377, 378, 379]) == "<tool>"


def test_an_added_token_whose_id_is_not_the_next_is_refused(checkpoint: Path) -> None:
    write(checkpoint, "added_tokens.json", {"<tool>": 500})
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: lacks the token '<tool>'.*id 500.*next free id is 377"
    ):
        Tokenizer.load(checkpoint, {})


def test_the_settings_say_how_an_added_token_is_found(checkpoint: Path) -> None:
    added = {"2": {"content": "</s>", "rstrip": True}, "377": {"content": "<a>", "single_word": True}}
    vocab = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
    added |= {str(vocab["he"]): {"content": "he", "lstrip": True}, "9": {"content": "the", "rstrip": True}}
    write(checkpoint, "tokenizer_config.json", {"added_tokens_decoder": added})
    tokenizer = Tokenizer.load(checkpoint, {})
    plain = tokenizer.encode("a")
    assert tokenizer.encode("</s>  a") == [2, *plain]
    assert tokenizer.encode("a<a>a") != [*plain, 377, *plain]
    assert tokenizer.encode("<a>") == [377]
    assert tokenizer.encode("a  he") == [*plain, vocab["he"]]
    assert tokenizer.encode("the a")[-1] == vocab["Ġa"]  # another id is not of this vocabulary: nothing changes


def test_further_special_tokens_follow_the_vocabulary(checkpoint: Path) -> None:
    write(checkpoint, "special_tokens_map.json", {"additional_special_tokens": ["<x>", {"content": "<y>"}, "</s>"]})
    write(checkpoint, "tokenizer_config.json", {"extra_special_tokens": {"image_token": "<z>"}})
    tokenizer = Tokenizer.load(checkpoint, {})
    assert tokenizer.encode("<x><y></s><z>") == [377, 378, 2, 379]
    assert tokenizer.special_ids >= {377, 378, 2, 379}


def test_flags_of_a_special_token_stay(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["added_tokens"][2]["rstrip"] = True
    write(checkpoint, "tokenizer.json", content)
    for special in (True, False):
        content["added_tokens"][2]["special"] = special
        write(checkpoint, "tokenizer.json", content)
        write(checkpoint, "special_tokens_map.json", {"eos_token": "</s>"})
        tokenizer = Tokenizer.load(checkpoint, {})
        assert tokenizer.encode("</s>  a") == [2, *tokenizer.encode("a")]
        assert 2 in tokenizer.special_ids


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [({"add_bos_token": True}, [1], []), ({"add_bos_token": True, "add_eos_token": True}, [1], [2]), ({}, [], [])],
)
def test_the_settings_say_which_tokens_are_added_where_the_vocabulary_does_not(
    checkpoint: Path, flags: dict[str, bool], before: list[int], after: list[int]
) -> None:
    write(checkpoint, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"} | flags)
    tokenizer = Tokenizer.load(checkpoint, {})
    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [*before, *plain, *after]


def test_chat_templates_are_read_from_every_file(checkpoint: Path) -> None:
    write(checkpoint, "chat_template.json", {"chat_template": "json"})
    assert Tokenizer.load(checkpoint, {}).apply_chat_template([]) == "json"
    write(checkpoint, "tokenizer_config.json", {"chat_template": "settings"})
    assert Tokenizer.load(checkpoint, {}).apply_chat_template([]) == "settings"
    (checkpoint / "chat_template.jinja").write_text("jinja")
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = Tokenizer.load(checkpoint, {})
    assert [tokenizer.apply_chat_template([], tools) for tools in (None, [{"name": "clock"}])] == ["jinja", "tools"]


def test_templates_in_a_folder_go_along_with_that_of_the_settings(checkpoint: Path) -> None:
    write(checkpoint, "tokenizer_config.json", {"chat_template": "settings"})
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = Tokenizer.load(checkpoint, {})
    assert [tokenizer.apply_chat_template([], tools) for tools in (None, [{"name": "clock"}])] == ["settings", "tools"]


def test_several_chat_templates_may_be_given_by_name(checkpoint: Path) -> None:
    write(checkpoint, "tokenizer_config.json", {"chat_template": {"default": "a", "tool_use": "b"}})
    assert Tokenizer.load(checkpoint, {}).apply_chat_template([], [{"name": "clock"}]) == "b"


@pytest.mark.parametrize("source", [["x"], [{"name": "default"}], 7, {"default": ["x"]}])
def test_chat_templates_of_the_wrong_kind_are_refused(checkpoint: Path, source: Any) -> None:
    write(checkpoint, "tokenizer_config.json", {"chat_template": source})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: expected `chat_template` to be a text, or"):
        Tokenizer.load(checkpoint, {})


def test_files_that_are_no_text_are_refused(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8: .*that the model came with"):
        Tokenizer.load(checkpoint, {})
    (checkpoint / "tokenizer_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.load(checkpoint, {})


@pytest.mark.parametrize(
    ("tokenizer_config", "vocab_size", "match"),
    [
        ({}, 376, r"vocabulary has ids up to 376, but the model's `vocab_size` is 376.*of another model"),
        (
            {"eos_token": "<end>", "added_tokens_decoder": {"377": {"content": "<end>"}}},
            *(377, r"`eos_token` '<end>' has id 377, but the model's `vocab_size` is 377"),
        ),
    ],
)
def test_a_vocabulary_that_does_not_fit_the_model_is_refused(
    checkpoint: Path, tokenizer_config: dict[str, Any], vocab_size: int, match: str
) -> None:
    write(checkpoint, "tokenizer_config.json", tokenizer_config)
    with pytest.raises(CheckpointError, match=match):
        Tokenizer.load(checkpoint, {"vocab_size": vocab_size})


def test_an_added_token_beyond_the_model_is_told(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    # as Gemma 3's smallest has it: the token of images, and no embedding for it
    write(checkpoint, "tokenizer_config.json", {"added_tokens_decoder": {"377": {"content": "<image>"}}})
    assert Tokenizer.load(checkpoint, {"vocab_size": 377}).encode("<image>") == [377]
    assert "added tokens that the model lacks: ['<image>']" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("added_tokens.json", {"<a>": "7"}, r"added_tokens\.json: expected a token id for '<a>', got '7'"),
        (
            "generation_config.json",
            {"eos_token_id": ["7"]},
            r"generation_config\.json: expected a token id for 'eos_tok",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"7": "<a>"}},
            "`added_tokens_decoder` to map ids to objects",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<a>"]}, r"to map ids to objects .*got '': \['<a>'\]"),
        ("special_tokens_map.json", ["</s>"], "expected a JSON object, got list"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(checkpoint: Path, name: str, content: dict[str, Any], match: str) -> None:
    write(checkpoint, name, content)
    with pytest.raises(CheckpointError, match=match):
        Tokenizer.load(checkpoint, {})
