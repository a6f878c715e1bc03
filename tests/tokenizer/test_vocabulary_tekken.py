"""Ids of small tekken files; `test_reference_ids.py` holds those of mistral-common."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from podquant.errors import CheckpointError
from podquant.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.vocabularies import QWEN_PATTERN, merge_by_ranks, trained_ranks

NUM_SPECIAL = 40


def tekken(**changes: Any) -> dict[str, Any]:
    """What a tekken.json of 320 ranks holds, of which the model has the first 300."""
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in trained_ranks().items()
    ]
    config = {"pattern": QWEN_PATTERN, "num_vocab_tokens": 320, "version": "v3"}
    config |= {"default_vocab_size": 300 + NUM_SPECIAL, "default_num_special_tokens": NUM_SPECIAL}
    return {"config": config, "vocab": vocab} | changes


def directory_of(path: Path, content: dict[str, Any], **tokenizer_config: Any) -> Path:
    (path / "tekken.json").write_text(json.dumps(content))
    if tokenizer_config:
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return path


def listed(*names: str) -> list[dict[str, Any]]:
    return [{"rank": rank, "token_str": name, "is_control": name != "[THINK]"} for rank, name in enumerate(names)]


def ids_of(text: str) -> list[int]:
    ranks = {token: rank for token, rank in trained_ranks().items() if rank < 300}
    return [NUM_SPECIAL + rank for rank in merge_by_ranks(ranks, text)]


def test_ranks_follow_the_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(directory_of(tmp_path, tekken()), {"vocab_size": 340})
    text = "the quick dog\n\n 日本 👩‍👩‍👧"
    assert tokenizer.encode(text) == [1, *ids_of(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == [1]
    assert tokenizer.eos_ids == {2}


def test_special_tokens_are_found_where_a_template_writes_them(tmp_path: Path) -> None:
    template = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"
    tokenizer = Tokenizer.load(directory_of(tmp_path, tekken(), chat_template=template), {})
    ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert ids == [1, 3, *ids_of(" hello "), 4]
    assert tokenizer.encode("[TOOL_CALLS]<SPECIAL_39>", add_special_tokens=False) == [9, 39]
    assert tokenizer.decode(ids) == " hello "
    assert tokenizer.special_ids == set(range(NUM_SPECIAL))


def test_newer_files_list_their_special_tokens(tmp_path: Path) -> None:
    special = listed("<unk>", "<s>", "</s>", "[THINK]", "[INST]")
    content = tekken(special_tokens=special)
    content["config"]["version"] = "v13"
    tokenizer = Tokenizer.load(directory_of(tmp_path, content), {})
    ids = tokenizer.encode("[INST]hello[THINK]<SPECIAL_5>", add_special_tokens=False)
    assert ids == [4, *ids_of("hello"), 3, 5]
    assert tokenizer.decode(ids) == "hello[THINK]"  # no control token


@pytest.mark.parametrize(
    ("settings", "before", "after"), [({"add_bos_token": False}, [], []), ({"add_eos_token": True}, [1], [2])]
)
def test_the_settings_say_which_tokens_are_added(
    tmp_path: Path, settings: dict[str, bool], before: list[int], after: list[int]
) -> None:
    tokenizer = Tokenizer.load(directory_of(tmp_path, tekken(), **settings), {})
    assert tokenizer.encode("hello") == [*before, *ids_of("hello"), *after]


def test_a_checkpoint_with_nothing_else_has_no_chats(tmp_path: Path) -> None:
    assert not Tokenizer.load(directory_of(tmp_path, tekken()), {}).has_chat_template


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has ids up to 339, but the model's `vocab_size` is 320"):
        Tokenizer.load(directory_of(tmp_path, tekken()), {"vocab_size": 320})


def in_config(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["config"].update(values)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda content: content.pop("vocab"), "expected `vocab` to be list, got None"),
        (lambda content: content.pop("config"), "expected `config` to be dict, got None"),
        (in_config(pattern="("), r"`pattern` '\(' is not a pattern tiktoken knows"),
        (in_config(default_vocab_size="x"), "expected `default_vocab_size` to be int, got 'x'"),
        (in_config(default_vocab_size=400), "less the special tokens is 360, but `vocab` has 320 tokens"),
        (in_config(default_num_special_tokens=10), "`default_num_special_tokens` is 10, but there are 20 special"),
        (in_config(version="v11"), "version v11 lists no `special_tokens`, expected from version v8 on"),
        (in_config(version="new"), "version new lists no `special_tokens`"),
        (lambda content: content["vocab"].pop(7), r"expected `vocab\[7\]` to have rank 7"),
        (lambda content: content["vocab"][9].update(token_bytes="?"), r"expected `vocab\[9\]` .*in base64"),
        (lambda content: content["vocab"].__setitem__(260, 5), r"expected `vocab\[260\]` .*got 5"),
        (
            lambda content: content["vocab"][299].update(token_bytes=content["vocab"][280]["token_bytes"]),
            "`vocab` holds a token twice",
        ),
        (lambda content: content.update(special_tokens=listed("a", "a")), "40 special tokens with 39 names"),
        (lambda content: content.update(special_tokens=[{"rank": 1, "token_str": "a"}]), r"special_tokens\[0\]` to"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[dict[str, Any]], None], match: str) -> None:
    content = tekken()
    damage(content)
    with pytest.raises(CheckpointError, match=rf"tekken\.json: .*{match}.*that the model came with"):
        Tokenizer.load(directory_of(tmp_path, content), {})


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match=r"tekken\.json is not valid JSON"):
        Tokenizer.load(tmp_path, {})
