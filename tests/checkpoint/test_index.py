from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from safetensors.numpy import save_file

from podquant.checkpoint.index import Checkpoint, FileInfo
from podquant.errors import CheckpointError, StorageError

ONE = np.ones((2, 3), np.float32)
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _single(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"x": ONE, "y": ONE}, folder / "model.safetensors")
    return folder


def _sharded(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text("{}")
    save_file({"b": ONE, "a": ONE}, folder / A)
    save_file({"c": ONE}, folder / B)
    weight_map = {"a": A, "b": A, "c": B} | changes
    index = {"metadata": {"total_size": 72}, "weight_map": {k: v for k, v in weight_map.items() if v}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _refused(folder: Path, text: str, error: type[Exception] = CheckpointError) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=re.escape(text)):
        Checkpoint.open(str(folder))
    assert set(os.listdir("/proc/self/fd")) <= before


def test_opens_a_single_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(_single(tmp_path)))
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    assert checkpoint.config == {"model_type": "llama"}
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {"x": (2, 3), "y": (2, 3)}
    assert checkpoint.files == {
        "model.safetensors": FileInfo(
            len(raw),
            hashlib.sha256(header).hexdigest(),
            google_crc32c.value(header),
            len(header),
        )
    }
    assert checkpoint.versions == {n: checkpoint.store.version(n) for n in ("config.json", "model.safetensors")}
    assert checkpoint.store.uri == str(tmp_path)
    checkpoint.close()
    with pytest.raises(StorageError, match="closed"):
        checkpoint.store.read_into("model.safetensors", 0, bytearray(1))


def test_opens_the_files_of_an_index(tmp_path: Path) -> None:
    (tmp_path / "consolidated.safetensors").write_bytes(b"another layout of the same weights")
    checkpoint = Checkpoint.open(str(_sharded(tmp_path)))
    assert list(checkpoint.files) == [A, B]
    assert [(name, info.file) for name, info in checkpoint.tensors.items()] == [("a", A), ("b", A), ("c", B)]


def test_opens_a_checkpoint_made_of_links(tmp_path: Path) -> None:
    blobs = _single(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in os.listdir(blobs):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert list(Checkpoint.open(str(snapshot)).tensors) == ["x", "y"]


def test_a_directory_without_config_is_refused(tmp_path: Path) -> None:
    _refused(tmp_path, f"{tmp_path}: no config.json. Expected the directory of a Hugging Face checkpoint.")


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    (_single(tmp_path) / "config.json").write_text("{")
    _refused(tmp_path, f"{tmp_path}/config.json: not valid JSON")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "Expected the directory of a Hugging Face checkpoint."),
        ("pytorch_model.bin", "Found pytorch_model.bin, which podquant does not read: save as safetensors first."),
        ("model.gguf", "Found model.gguf, which podquant does not read"),
        ("weights.safetensors", "Found weights.safetensors, which is not in Hugging Face's layout."),
    ],
)
def test_a_directory_without_weights_says_what_it_found(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    _refused(tmp_path, f"{tmp_path}: expected model.safetensors or model.safetensors.index.json, found neither. {text}")


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = _single(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    _refused(tmp_path, f"{path}: tensor 'y' ends at byte")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (_sharded(tmp_path) / B).unlink()
    _refused(tmp_path, f"model.safetensors.index.json: names files that are missing: {B}. Download them.")


def test_many_missing_files_are_counted(tmp_path: Path) -> None:
    _sharded(tmp_path, **{f"t{i}": f"f{i}" for i in range(5)})
    _refused(tmp_path, "missing: f0, f1, f2 and 2 more.")


def test_the_index_cannot_lead_out_of_the_directory(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    save_file({"c": ONE}, tmp_path / "out.safetensors")
    _refused(_sharded(inner, c="../out.safetensors"), "names '../out.safetensors', which is not a name inside")


def test_a_tensor_that_no_file_holds_is_named(tmp_path: Path) -> None:
    _sharded(tmp_path, d=B)
    _refused(tmp_path, f"index.json: places d in {B}, and neither that nor another file holds it: the index was made")


def test_the_headers_have_the_last_word_on_where_a_tensor_lies(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(_sharded(tmp_path, a=B, b=None)))
    assert {name: info.file for name, info in checkpoint.tensors.items()} == {"a": A, "b": A, "c": B}


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    save_file({"c": ONE, "a": ONE}, _sharded(tmp_path) / B)
    _refused(tmp_path, f"tensor 'a' is in both {A} and {B}.")


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    _sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{A}", "a": "{B}"}}}}')
    _refused(tmp_path, "index.json: not valid JSON: duplicate key 'a'")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, index: str) -> None:
    (_sharded(tmp_path) / "model.safetensors.index.json").write_text(index)
    _refused(tmp_path, "index.json: expected a weight_map from tensor names to file names.")


def test_a_single_file_beside_an_index_of_others_is_ambiguous(tmp_path: Path) -> None:
    _sharded(_single(tmp_path))
    _refused(tmp_path, "holds both model.safetensors and an index of other files. Remove one of the two.")


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    index = {"weight_map": dict.fromkeys("xy", "model.safetensors")}
    (_single(tmp_path) / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(Checkpoint.open(str(tmp_path)).files) == ["model.safetensors"]
