"""Whether the embedding is the head too: one answer, from config.json and the names of the tensors, for both halves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from podquant.checkpoint.index import Checkpoint
from podquant.conversion.contents import read_contents
from podquant.errors import CheckpointError
from podquant.families.registry import is_tied
from tests.weights.test_load import GOLDENS, as_internlm2, load, to_artifact

LLAMA, GEMMA, INTERNLM2 = "LlamaForCausalLM", "GemmaForCausalLM", "InternLM2ForCausalLM"
BODY = ["model.embed_tokens.weight", "model.norm.weight"]
HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("architecture", "says", "names", "tied"),
    [
        (LLAMA, {"tie_word_embeddings": True}, [*BODY, HEAD], True),
        (LLAMA, {"tie_word_embeddings": False}, BODY, False),
        (LLAMA, {}, BODY, True),
        (LLAMA, {}, [*BODY, HEAD], False),
        (LLAMA, {"tie_word_embeddings": None}, [*BODY, HEAD], False),
        (LLAMA, {}, [*BODY, "lm_head.weight_packed"], False),
        (GEMMA, {}, [*BODY, HEAD], True),  # as its class in transformers has it: the stored head is the same again
        (GEMMA, {"tie_word_embeddings": False}, [*BODY, HEAD], False),
        (INTERNLM2, {}, ["model.tok_embeddings.weight", "output.weight"], False),
        (INTERNLM2, {}, ["model.tok_embeddings.weight"], True),
        ("GptOssForCausalLM", {}, [*BODY, HEAD], False),
        ("GptOssForCausalLM", {}, BODY, True),
    ],
)
def test_the_key_decides_then_the_family_then_the_names(
    architecture: str, says: dict[str, Any], names: Sequence[str], tied: bool
) -> None:
    assert is_tied({"architectures": [architecture], **says}, names) is tied


def test_a_key_that_is_neither_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^here: `tie_word_embeddings` must be true or false, got 'yes'"):
        is_tied({"tie_word_embeddings": "yes"}, BODY, "here")


def without_key(checkpoint: Path, *lost: str) -> Path:
    """The checkpoint with config.json silent on the matter, and without some tensors."""
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (checkpoint / "config.json").write_text(json.dumps(config))
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({n: a for n, a in tensors.items() if n not in lost}, checkpoint / "model.safetensors", {"format": "pt"})
    return checkpoint


def test_a_head_by_another_name_is_spared_by_both_halves(tmp_path: Path) -> None:
    checkpoint = without_key(as_internlm2(tmp_path / "model"))
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "quantization: {ignored_layers: [output], dense: {rules: [{module_path: '.*', weight_dtype: int8}]}}"
    )
    on_load, converted = load(str(checkpoint), str(rules)), load(to_artifact(checkpoint, str(rules), tmp_path / "out"))
    assert converted.keys() == on_load.keys()
    for path, array in converted.items():
        assert array.tobytes() == on_load[path].tobytes(), path
    assert on_load["lm_head", "weight"].dtype == np.float32
    assert on_load["embed_tokens", "table", "weight"].dtype == np.int8
    assert load(str(tmp_path / "out"), str(rules)).keys() == on_load.keys()


def test_a_model_without_key_and_head_is_tied_in_both_halves(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "llama", tmp_path / "model")
    checkpoint = without_key(tmp_path / "model", HEAD)
    assert read_contents(Checkpoint.open(str(checkpoint))).tied
    on_load, converted = (
        load(str(checkpoint), "int8.yaml"),
        load(to_artifact(checkpoint, "int8.yaml", tmp_path / "out")),
    )
    assert converted.keys() == on_load.keys()
    assert ("lm_head", "weight") not in on_load


def test_a_head_that_the_family_ties_is_left_out(tmp_path: Path) -> None:
    """Gemma's class ties where config.json says nothing: a head beside the embedding is the same tensor again."""
    shutil.copytree(GOLDENS / "gemma", tmp_path / "model")
    checkpoint = without_key(tmp_path / "model")
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({**tensors, HEAD: tensors[BODY[0]].copy()}, checkpoint / "model.safetensors", {"format": "pt"})
    assert read_contents(Checkpoint.open(str(checkpoint))).redundant is not None
    on_load, converted = (
        load(str(checkpoint), "int8.yaml"),
        load(to_artifact(checkpoint, "int8.yaml", tmp_path / "out")),
    )
    assert converted.keys() == on_load.keys()
    assert ("lm_head", "weight") not in on_load
