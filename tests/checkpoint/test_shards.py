"""Which files make up a checkpoint: index, numbers, leftovers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from podquant.checkpoint.index import Checkpoint
from podquant.errors import CheckpointError

ONE = np.ones((2, 2), np.float32)


def shard(number: int, count: int, stem: str = "model") -> str:
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def checkpoint(place: Path, files: dict[str, str], index: dict[str, str] | None = None) -> Path:
    """Writes files, each with the tensors that the letters of a text name, and an index."""
    (place / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file(dict.fromkeys(tensors, ONE), place / name)
    if index is not None:
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return place


TWO = {shard(1, 2): "ab", shard(2, 2): "c"}
WORKS: dict[str, tuple[dict[str, str], dict[str, str] | None, str]] = {
    "numbered files without an index": (TWO, None, "abc"),
    "numbered files of another stem": ({shard(1, 2, "weights"): "a", shard(2, 2, "weights"): "b"}, None, "ab"),
    "numbered files beside those of another format": (
        {shard(1, 1): "a", shard(1, 2, "consolidated"): "x", shard(2, 2, "consolidated"): "y"},
        None,
        "a",
    ),
    "an index that lists a part of a file": (TWO, {"a": shard(1, 2), "c": shard(2, 2)}, "abc"),
    "an index that does not list a file": (TWO, {"a": shard(1, 2), "b": shard(1, 2)}, "abc"),
    "an index from before tensors moved": (TWO, {"a": shard(2, 2), "b": shard(2, 2), "c": shard(1, 2)}, "abc"),
    "a file left over from a save in more files": (
        {**TWO, shard(3, 3): "cd"},
        {"a": shard(1, 2), "b": shard(1, 2), "c": shard(2, 2)},
        "abc",
    ),
    "one file, numbered": ({shard(1, 1): "ab"}, None, "ab"),
}


@pytest.mark.parametrize("case", list(WORKS))
def test_these_work(tmp_path: Path, case: str) -> None:
    files, index, expected = WORKS[case]
    opened = Checkpoint.open(str(checkpoint(tmp_path, files, index)))
    assert "".join(sorted(opened.tensors)) == expected
    opened.close()


REFUSED: dict[str, tuple[dict[str, str], dict[str, str] | None, str]] = {
    "a missing number": (
        {shard(1, 3): "a", shard(3, 3): "c"},
        None,
        f"of its 3 numbered files are missing: {shard(2, 3)}. Fetch them.",
    ),
    "two series": (
        {shard(1, 1, "x"): "a", shard(1, 1, "y"): "b"},
        None,
        f"holds numbered files of several saves ({shard(1, 1, 'x')}, {shard(1, 1, 'y')}), and no",
    ),
    "two saves of the model": (
        {shard(1, 1): "a", shard(1, 2): "a", shard(2, 2): "b"},
        None,
        f"holds numbered files of several saves ({shard(1, 1)}, {shard(1, 2)}), and no model.safetensors.index.json",
    ),
    "one file and numbered ones": (
        {"model.safetensors": "ab", shard(1, 2): "a", shard(2, 2): "b"},
        None,
        f"holds both model.safetensors and {shard(1, 2)}, {shard(2, 2)}, and no model.safetensors.index.json says",
    ),
    "an index of a tensor that is nowhere": (
        {shard(1, 2): "a", shard(2, 2): "b"},
        {"a": shard(1, 2), "b": shard(2, 2), "c": shard(2, 2)},
        f"places c in {shard(2, 2)}, and neither that nor another file holds it",
    ),
    "a file of the series that repeats a tensor": (
        {shard(1, 2): "a", shard(2, 2): "ab"},
        {"a": shard(1, 2)},
        f"tensor 'a' is in both {shard(1, 2)} and {shard(2, 2)}. They are from two saves: remove the one that",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_these_are_refused_with_the_file(tmp_path: Path, case: str) -> None:
    files, index, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        Checkpoint.open(str(checkpoint(tmp_path, files, index)))
    assert "copy" not in str(caught.value).lower()
    assert "again" not in str(caught.value)


def test_what_an_index_leaves_out_is_told(tmp_path: Path) -> None:
    files = {shard(1, 1): "a", "extra.safetensors": "b"}
    opened = Checkpoint.open(str(checkpoint(tmp_path, files, {"a": shard(1, 1)})))
    assert opened.notes == ("model.safetensors.index.json does not name extra.safetensors: left out",)
    opened.close()


def test_an_adapter_beside_the_weights_is_told_and_one_alone_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, {"model.safetensors": "a", "adapter_model.safetensors": "b"})
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    opened = Checkpoint.open(str(tmp_path))
    (note,) = opened.notes
    assert note.startswith(
        "adapter_config.json is there: the adapter of org/base is not applied, only the full weights"
    )
    opened.close()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="this is a LoRA adapter of org/base: merge it into its base first"):
        Checkpoint.open(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="this is a LoRA adapter of org/base"):
        Checkpoint.open(str(tmp_path))
