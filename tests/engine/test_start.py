"""What is refused before a weight is read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from podquant.engine.options import EngineOptions
from podquant.engine.start import load_tokenizer, open_model, start_engine
from podquant.errors import CheckpointError, ConfigError
from tests.storage.kinds import storage
from tests.tokenizer.conftest import byte_level
from tests.tokenizer.vocabularies import trained_ranks, write_ranks

GOLDEN = Path(__file__).parent.parent / "data" / "goldens" / "llama"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    return tmp_path


def refuse(checkpoint: Path, match: str) -> None:
    read: list[tuple[int, int]] = []
    options = EngineOptions(model_path=str(checkpoint), device="cpu", skip_server_warmup=True)
    with pytest.raises(CheckpointError, match=match):
        start_engine(options, on_load=lambda done, total: read.append((done, total)))
    assert read == []


def test_a_missing_tokenizer_is_refused_before_anything_is_loaded(checkpoint: Path) -> None:
    refuse(checkpoint, rf"{checkpoint}/tokenizer\.json is missing.*--skip-tokenizer-init")


def test_a_vocabulary_larger_than_the_model_is_refused_before_anything_is_loaded(checkpoint: Path) -> None:
    vocabulary = byte_level()
    vocabulary.add_tokens([f"<{number}>" for number in range(200)])
    vocabulary.save(str(checkpoint / "tokenizer.json"))
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"<{number}>": 400 + number for number in range(200)}
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    refuse(checkpoint, rf"{checkpoint}: the tokenizer's vocabulary has ids up to 599.*`vocab_size` is 512")


def test_a_context_that_would_change_the_rotation_is_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0}
    (checkpoint / "config.json").write_text(json.dumps(config))
    options = EngineOptions(model_path=str(checkpoint), device="cpu", context_length=513)
    with pytest.raises(ConfigError, match=r"context_length 513: .* rope type 'dynamic' .* up to the 512 positions"):
        open_model(options)
    open_model(replace(options, context_length=512)).source.close()


def test_every_form_of_vocabulary_is_found_beside_the_weights(checkpoint: Path) -> None:
    write_ranks(checkpoint / "qwen.tiktoken", trained_ranks())
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (checkpoint / "chat_template.jinja").write_text("plain")
    with open_model(EngineOptions(model_path=str(checkpoint), device="cpu")) as opened:
        tokenizer = load_tokenizer(opened)
    assert tokenizer is not None
    assert tokenizer.encode("the<|im_end|>")[-1] == 322
    assert [tokenizer.apply_chat_template([], tools) for tools in (None, [{"name": "clock"}])] == ["plain", "tools"]


@pytest.mark.parametrize("place", ["org/one", "hf://org/one", "hf://org/one@main"])
def test_a_branch_of_the_hub_is_one_commit_for_all_who_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with storage("hf", tmp_path, monkeypatch) as put:
        put(GOLDEN, "one")
        with open_model(EngineOptions(place, device="cpu"), by_ranges=True) as first:
            assert first.options.revision is not None
        put(GOLDEN, "one")  # a push in between
        with open_model(replace(first.options, model_path=place), by_ranges=True) as other:
            assert other.source.store.uri == first.source.store.uri == f"hf://org/one@{first.options.revision}"
        with open_model(EngineOptions(place, device="cpu"), by_ranges=True) as later:
            assert later.source.store.uri != first.source.store.uri
