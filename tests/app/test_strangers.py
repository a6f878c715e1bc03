"""Files made by strangers at the front doors, `plan`, `convert`, `load` and `verify`: links, pipes and bombs.

Each is an error that names the file, and none takes long.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import podquant
from podquant.app.artifacts import export, merge
from podquant.engine.options import EngineOptions
from podquant.engine.start import load_defaults, load_tokenizer, open_model
from podquant.errors import ArtifactError, CheckpointError, PodquantError, StorageError
from tests.checkpoint.tiny import write_tiny

RULES = "int8.yaml"
COPIED = (
    *("LICENSE", "README.md", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    *("chat_template.jinja", "additional_chat_templates/tool.jinja"),
)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint with all kinds of files, in a snapshot of Hugging Face's cache; that is a plain directory, too."""
    place = write_tiny(tmp_path / "models--org--name" / "snapshots" / ("0" * 40))
    vocabulary = {word: number for number, word in enumerate("abcdefghijklmno")} | {"[UNK]": 15}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(place / "tokenizer.json"))
    (place / "additional_chat_templates").mkdir()
    for name in COPIED:
        if not (place / name).exists():
            (place / name).write_text("{}")
    return place


def doors(place: Path, out: Path) -> list[str]:
    """What each front door says to a checkpoint: an error's text, or nothing."""

    def load() -> None:
        with open_model(EngineOptions(str(place), device="cpu")) as opened:
            load_tokenizer(opened)
            load_defaults(opened)

    said = []
    for door in (lambda: podquant.plan(place, RULES), lambda: podquant.convert(place, out, RULES), load):
        try:
            door()
            said.append("")
        except PodquantError as error:
            said.append(str(error))
    return said


def link(place: Path, name: str, target: str) -> None:
    """Put a link in the place of a file, relative to the checkpoint."""
    (place / name).unlink(missing_ok=True)
    (place / name).symlink_to("../" * name.count("/") + target)


def test_a_snapshot_made_of_links_passes_all_doors(whole: Path, tmp_path: Path) -> None:
    blobs = whole.parents[1] / "blobs"
    blobs.mkdir()
    for number, name in enumerate(sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())):
        shutil.move(whole / name, blobs / f"{number:040x}")
        link(whole, name, f"../../blobs/{number:040x}")
    (tmp_path / "link").symlink_to(whole)
    for place, out in ((whole, tmp_path / "first"), (tmp_path / "link", tmp_path / "second")):
        assert doors(place, out) == ["", "", ""]
        assert (out / "LICENSE").read_text() == "{}"
        assert not any(path.is_symlink() for path in out.rglob("*"))
        assert podquant.verify(out) == []


@pytest.mark.parametrize("name", [*COPIED, "config.json", "model.safetensors"])
def test_a_link_to_a_file_of_the_host_is_refused(whole: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes((whole / name).read_bytes() + b" ")
    link(whole, name, "../../../secret")
    said = doors(whole, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for text in said if name not in ("LICENSE", "README.md") else said[:2]:  # serving needs neither of these
        assert text.startswith(f"{whole}/{name}: leads out of the directory, to {tmp_path}/secret."), said


@pytest.mark.parametrize("name", [*COPIED, "config.json", "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(whole: Path, tmp_path: Path, name: str) -> None:
    (whole / name).unlink()
    os.mkfifo(whole / name)
    said = doors(whole, tmp_path / "out")
    for text in said if name not in ("LICENSE", "README.md") else said[:2]:
        assert f"{whole}/{name}: expected a regular file, found a pipe (FIFO)" in text, said


@pytest.mark.parametrize("content", ["{", "[]", "3", "[" * 100_000, '{"temperature": ' + "9" * 5000 + "}", "\x00"])
def test_bad_defaults_are_refused_by_all_in_one_message(whole: Path, tmp_path: Path, content: str) -> None:
    (whole / "generation_config.json").write_text(content)
    (message,) = set(doors(whole, tmp_path / "out"))
    assert message.startswith(f"{whole}/generation_config.json")
    assert message.endswith("Correct it, or take the file that the model came with.")
    assert len(message) < 400


@pytest.mark.parametrize("name", ["/etc/hostname", "../../../secret", "a/../../secret", "./model.safetensors"])
def test_an_index_cannot_name_a_file_outside(whole: Path, tmp_path: Path, name: str) -> None:
    (whole / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for text in doors(whole, tmp_path / "out"):
        assert f"model.safetensors.index.json: names '{name}', which is not a name inside the checkpoint" in text


@pytest.fixture
def artifact(whole: Path, tmp_path: Path) -> Path:
    """Cut in two, so that it can be merged."""
    podquant.convert(whole, tmp_path / "artifact", RULES, tp_size=2)
    return tmp_path / "artifact"


@pytest.mark.parametrize("name", ["LICENSE", "config.json", "tp-00-of-02/model-00001-of-00001.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_an_artifact_is_read_no_other_way(artifact: Path, tmp_path: Path, name: str, kind: str) -> None:
    """Not even where the file outside is the very same."""
    shutil.move(artifact / name, tmp_path / "secret")
    if kind == "link":
        link(artifact, name, "../secret")
    else:
        os.mkfifo(artifact / name)
    expected = "leads out of the directory" if kind == "link" else "expected"
    assert any(f"{name}: {expected}" in problem for problem in podquant.verify(artifact))
    for use in (merge, lambda *places: export(*places, form=None, portable=True)):
        with pytest.raises((StorageError, ArtifactError), match=re.escape(f"{name}: {expected}")):
            use(str(artifact), str(tmp_path / "made"))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "tp-00-of-02/../../secret"])
def test_a_manifest_cannot_name_a_file_outside(artifact: Path, name: str) -> None:
    manifest = json.loads((artifact / "podquant.json").read_text())
    manifest["files"][name] = manifest["files"].pop("LICENSE")
    (artifact / "podquant.json").write_text(json.dumps(manifest))
    (problem,) = podquant.verify(artifact)
    assert f"expected a name inside the artifact, got '{name}'" in problem


MOST = 2**31 - 1
COUNTS = (
    *("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "num_local_experts"),
)


@pytest.mark.parametrize("count", [MOST, 10**18, 10**90])
@pytest.mark.parametrize("key", COUNTS)
def test_counts_of_config_json_are_compared_with_the_headers(tmp_path: Path, key: str, count: int) -> None:
    moe = {"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 1} if key == "num_local_experts" else {}
    place = write_tiny(tmp_path / "m", None, **moe, **{key: count})
    plan, converted, loaded = doors(place, tmp_path / "out")
    assert plan == converted == loaded
    assert plan.startswith(f"{place}")
    assert len(plan) < 500


@pytest.mark.parametrize("tp_size", [1, 2])
def test_weights_only_compares_counts_too(tmp_path: Path, tp_size: int) -> None:
    place = write_tiny(tmp_path / "m", num_hidden_layers=10**18)
    with pytest.raises(CheckpointError, match=r"layers\.1 is missing: config\.json says num_hidden_layers"):
        podquant.plan(place, RULES, weights_only=True, tp_size=tp_size)


def write_header(place: Path, tensors: dict[str, Any], nbytes: int) -> None:
    """A file of these tensors that takes no room on the disk."""
    text = json.dumps(tensors).encode()
    with open(place / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + nbytes)


@pytest.mark.parametrize(("shape", "nbytes"), [([10**9, 8, 0], 0), ([10**9, 1, 1], 10**9)])
def test_fused_experts_are_counted_not_made(tmp_path: Path, shape: list[int], nbytes: int) -> None:
    moe = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 10**9, "hidden_size": shape[1]}
    place = write_tiny(tmp_path / "m", None, **moe)
    fused = {"dtype": "I8", "shape": shape, "data_offsets": [0, nbytes]}
    write_header(place, {"model.layers.0.mlp.experts.down_proj": fused}, nbytes)
    with pytest.raises(CheckpointError, match=r"down_proj: expected shape \[1000000000, "):
        podquant.plan(place, RULES)


@pytest.mark.parametrize("count", ["99999", "99999999"])
def test_numbered_files_are_counted_not_named(tmp_path: Path, count: str) -> None:
    place = write_tiny(tmp_path / "m")
    (place / "model.safetensors").rename(place / f"model-00001-of-{count}.safetensors")
    with pytest.raises(CheckpointError, match=r"99,995 more|is not in Hugging Face's layout") as raised:
        podquant.plan(place, RULES)
    assert len(str(raised.value)) < 400


VALUES: dict[str, Any] = {
    "architectures": ["x" * 1_000_000],
    "dtype": {"a": "x" * 1_000_000},
    "hidden_act": ["x" * 1_000_000],
    "rope_scaling": {"rope_type": {"a": "x" * 1_000_000}},
    "rope_theta": "9" * 1_000_000,
    "tie_word_embeddings": [[["x"] * 100_000]],
    "rms_norm_eps": [10**90] * 100_000,
    "eos_token_id": ["x" * 1_000_000],
    "attention_bias": "x" * 1_000_000,
    "num_hidden_layers": "9" * 1_000_000,
}


@pytest.mark.parametrize("key", VALUES)
def test_values_of_config_json_are_cut(tmp_path: Path, key: str) -> None:
    place = write_tiny(tmp_path / "m", **{key: VALUES[key]})
    for text in doors(place, tmp_path / "out"):
        assert 0 < len(text) < 800
