"""Ids and texts that transformers, mistral-common and tiktoken give (`tests/benchmarks/tokenizer_reference.py`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from podquant.tokenizer.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data" / "tokenizers"
REFERENCE = json.loads((DATA / "reference.json").read_text())
TEXTS: list[str] = REFERENCE["texts"]


def load(case: dict[str, Any], directory: Path) -> Tokenizer:
    for name, source in case["files"].items():
        shutil.copy(DATA / source, directory / name)
    if case["tokenizer_config"] is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(case["tokenizer_config"]))
    return Tokenizer.load(directory, {"model_type": case["model_type"]})


@pytest.fixture(scope="module", params=REFERENCE["cases"], ids=lambda case: case["name"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Tokenizer]:
    return request.param, load(request.param, tmp_path_factory.mktemp("tokenizer"))


def test_ids_are_the_references(case: tuple[dict[str, Any], Tokenizer]) -> None:
    expected, tokenizer = case
    for text, ids in zip(TEXTS, expected["ids"], strict=True):
        if ids is not None:
            adds = expected["tokenizer_config"] is not None or "tokenizer.model" not in expected["files"]
            assert (text, tokenizer.encode(text, add_special_tokens=adds)) == (text, ids)


def test_texts_are_the_references(case: tuple[dict[str, Any], Tokenizer]) -> None:
    expected, tokenizer = case
    for text, ids, decoded in zip(TEXTS, expected["ids"], expected["decoded"], strict=True):
        if ids is not None:
            assert (text, tokenizer.decode(ids)) == (text, decoded)


def test_texts_stream_as_they_decode(case: tuple[dict[str, Any], Tokenizer]) -> None:
    expected, tokenizer = case
    for ids, decoded in zip(expected["ids"], expected["decoded"], strict=True):
        if ids is not None:
            detokenizer = tokenizer.detokenizer([])
            parts = [detokenizer.push(token_id) for token_id in ids]
            assert "".join(parts) + detokenizer.flush() == decoded
            if "\N{REPLACEMENT CHARACTER}" not in decoded:
                assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
