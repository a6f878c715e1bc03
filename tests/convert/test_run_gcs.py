"""Whole conversions from a bucket to a bucket: the same bytes as on a disk, each read once, and no wrong artifact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from podquant.artifact.verify import verify_artifact
from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.convert.plan import plan_conversion
from podquant.convert.run import convert
from podquant.errors import ArtifactExistsError, StorageError
from tests.storage.gcs_emulator import GcsEmulator

TARGET = "gs://b/out"


@pytest.fixture
def emulator(source: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsEmulator]:
    """A bucket with the tiny Llama."""
    with GcsEmulator("b") as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        for path in source.path.iterdir():
            emulator.put("b", f"source/{path.name}", path.read_bytes())
        yield emulator


def run(place: str, target: str, **options: Any) -> None:
    checkpoint = Checkpoint.open(place)
    plan = plan_conversion(checkpoint, load_quantization_config("int8.yaml"), source_name="source")
    convert(checkpoint, plan, target, threads=2, window_bytes=1 << 20, **options)
    checkpoint.store.close()


def artifact(emulator: GcsEmulator) -> dict[str, bytes]:
    return {name.removeprefix("out/"): data for name, data in emulator.data("b").items() if name.startswith("out")}


def local(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_same_bytes_as_on_a_disk_each_read_once(
    emulator: GcsEmulator, source: Any, tensors: dict[str, Any], tmp_path: Path
) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"] = np.full((4000, 2000), 0.5, np.float16)
    source.write(tensors, {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False})
    for path in source.path.iterdir():
        emulator.put("b", f"source/{path.name}", path.read_bytes())
    run(str(source.path), str(tmp_path / "out"))
    run("gs://b/source", TARGET)
    assert artifact(emulator) == local(tmp_path / "out")
    asked = sum(path.stat().st_size for path in source.path.iterdir())
    assert sum(record.bytes_out for record in emulator.requests("alt=media")) <= asked * 1.02
    written = sum(len(data) for data in artifact(emulator).values())
    assert sum(record.bytes_in for record in emulator.log) <= written * 1.02
    assert len(emulator.requests(r"/o\?prefix=source/")) == 2  # to plan, and for the only unit
    assert not [record for record in emulator.requests("^GET .*/o/") if "alt=media" not in record.request]
    assert verify_artifact(TARGET) == []
    with pytest.raises(ArtifactExistsError, match="gs://b/out: already exists"):
        run("gs://b/source", TARGET)
    run("gs://b/source", TARGET, overwrite=True)
    assert artifact(emulator) == local(tmp_path / "out")


@pytest.mark.parametrize("request_", ["alt=media", "^POST .*upload", "^PUT .*upload"])
@pytest.mark.parametrize("status", [403, 503])
def test_a_fault_ends_in_the_right_artifact_or_in_none(
    emulator: GcsEmulator, source: Any, tmp_path: Path, request_: str, status: int
) -> None:
    run(str(source.path), str(tmp_path / "out"))
    emulator.fail("status", request_, status=status, skip=3, times=2)
    if status == 503 or request_.startswith("^PUT"):  # files so small are sent with POST
        run("gs://b/source", TARGET)
        assert artifact(emulator) == local(tmp_path / "out")
    else:
        with pytest.raises(StorageError, match="HTTP 403"):
            run("gs://b/source", TARGET)
        assert artifact(emulator) == {}
