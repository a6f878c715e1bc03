from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from podquant.errors import CheckpointError, UnsupportedModelError
from podquant.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.conftest import byte_level
from tests.tokenizer.vocabularies import HARD_TEXTS

SIZE = 377


def directory_of(path: Path, **tokenizer_config: Any) -> Path:
    """The files that GPT-2 and Qwen 2 have, less tokenizer.json."""
    byte_level().model.save(str(path))
    if tokenizer_config:
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return path


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer"])
@pytest.mark.parametrize("text", HARD_TEXTS[:-1])
def test_texts_survive(tmp_path: Path, name: str, text: str) -> None:
    import unicodedata

    tokenizer = Tokenizer.load(directory_of(tmp_path, tokenizer_class=name), {"vocab_size": SIZE})
    expected = unicodedata.normalize("NFC", text) if name.startswith("Qwen") else text
    assert tokenizer.decode(tokenizer.encode(text)) == expected


@pytest.mark.parametrize(("name", "pieces"), [("GPT2Tokenizer", [b"12"]), ("Qwen2Tokenizer", [b"1", b"2"])])
def test_classes_split_as_they_say(tmp_path: Path, name: str, pieces: list[bytes]) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"1": 0, "2": 1, "12": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n1 2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    tokenizer = Tokenizer.load(tmp_path, {})
    assert [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode("12")] == pieces


def test_added_tokens_follow_the_vocabulary(tmp_path: Path) -> None:
    added = {str(SIZE + offset): {"content": name, "special": True} for offset, name in enumerate(("<|a|>", "<|b|>"))}
    settings = {"added_tokens_decoder": added, "eos_token": "<|b|>", "add_prefix_space": True}
    tokenizer = Tokenizer.load(directory_of(tmp_path, tokenizer_class="Qwen2Tokenizer", **settings), {})
    ids = tokenizer.encode("<|a|>the<|b|>")
    assert [tokenizer.token_bytes(token_id) for token_id in ids] == [b"<|a|>", b" the", b"<|b|>"]
    assert tokenizer.eos_ids == {SIZE + 1}


def test_the_model_type_tells_the_class(tmp_path: Path) -> None:
    assert Tokenizer.load(directory_of(tmp_path), {"model_type": "qwen3"}).encode("the")


def test_unknown_classes_and_missing_or_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"vocab\.json: how tokenizer class X splits a text is not known"):
        Tokenizer.load(directory_of(tmp_path, tokenizer_class="X"), {})
    directory_of(tmp_path, tokenizer_class="GPT2Tokenizer")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nqq zz\n")
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt are no BPE vocabulary: .*qq"):
        Tokenizer.load(tmp_path, {})
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"merges\.txt is missing, without which vocab\.json is no tokenizer"):
        Tokenizer.load(tmp_path, {})
