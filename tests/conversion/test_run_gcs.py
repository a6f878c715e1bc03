"""Whole conversions from a bucket to a bucket: the same bytes as on a disk, each read once, and no wrong artifact."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from podquant.artifact.verify import verify_artifact
from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import check_target, convert
from podquant.errors import ArtifactExistsError, PodquantError, StorageError
from podquant.storage.gcs import client as gcs_client
from podquant.storage.retry import Patience
from tests.storage.gcs.emulator import GcsEmulator

TARGET = "gs://b/out"


@pytest.fixture
def emulator(source: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsEmulator]:
    """A bucket with the tiny Llama."""
    with GcsEmulator("b") as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        for path in source.path.iterdir():
            emulator.put("b", f"source/{path.name}", path.read_bytes())
        yield emulator


@pytest.fixture
def large(source: Any, tensors: dict[str, Any], emulator: GcsEmulator) -> Any:
    """The tiny Llama with one matrix of 16 MB, whose codes take an upload in chunks."""
    tensors["model.layers.1.mlp.down_proj.weight"] = np.full((4300, 2000), 0.5, np.float16)
    source.write(tensors, {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False})
    for path in source.path.iterdir():
        emulator.put("b", f"source/{path.name}", path.read_bytes())
    return source


def run(place: str, target: str, **options: Any) -> None:
    checkpoint = Checkpoint.open(place)
    plan = plan_conversion(checkpoint, load_quantization_config("int8.yaml"), source_name="source")
    convert(checkpoint, plan, target, threads=2, window_bytes=1 << 20, **options)
    checkpoint.store.close()


def artifact(emulator: GcsEmulator) -> dict[str, bytes]:
    return {name.removeprefix("out/"): data for name, data in emulator.data("b").items() if name.startswith("out")}


def local(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_same_bytes_as_on_a_disk_each_read_once(emulator: GcsEmulator, large: Any, tmp_path: Path) -> None:
    run(str(large.path), str(tmp_path / "out"))
    run("gs://b/source", TARGET)
    assert artifact(emulator) == local(tmp_path / "out")
    asked = sum(path.stat().st_size for path in large.path.iterdir())
    assert sum(record.bytes_out for record in emulator.requests("alt=media")) <= asked * 1.02
    written = sum(len(data) for data in artifact(emulator).values())
    assert sum(record.bytes_in for record in emulator.log) <= written * 1.02
    assert len(emulator.requests(r"/o\?prefix=source/")) == 4  # to plan, before and after the only unit, at the end
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


READ, PUT = "/o/source/.*alt=media", "^PUT .*upload_id"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients made from now on wait tenths of seconds where others wait half minutes."""
    quick = partial(Patience, silence=0.5, deadline=5.0, first_wait=0.01, longest_wait=0.1)
    monkeypatch.setattr(gcs_client, "Patience", quick)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("kind", "request_", "options"),
    [
        ("status", READ, {"status": 503, "times": 12}),
        ("status", READ, {"status": 429, "times": 5, "headers": {"Retry-After": "0"}}),
        ("status", PUT, {"status": 503, "times": 5}),
        ("status", "uploadType=", {"status": 429, "times": 5}),
        ("reset", READ, {"after": 100_000, "times": 3}),
        ("stall", READ, {"after": 100_000}),
        ("truncate", READ, {"after": 100_000, "times": 3}),
        ("reset", PUT, {"after": 100_000}),
        ("short", PUT, {"after": 262_144}),
        ("lost", PUT, {"times": 2}),
        ("stall", PUT, {}),
        ("wrong_crc", PUT, {"times": 2}),
    ],
)
def test_a_fault_that_passes_changes_nothing(
    emulator: GcsEmulator, large: Any, tmp_path: Path, kind: str, request_: str, options: dict[str, Any]
) -> None:
    run(str(large.path), str(tmp_path / "out"))
    emulator.fail(kind, request_, **{"skip": 1, **options})
    run("gs://b/source", TARGET)
    assert artifact(emulator) == local(tmp_path / "out")
    assert not [name for name in emulator.data("b") if name.startswith(("out.", "out/."))]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("kind", "request_", "options", "message"),
    [
        ("status", READ, {"status": 403}, r"cannot read at offset .*HTTP 403.*role Storage Object User"),
        ("status", PUT, {"status": 403, "skip": 0}, r"cannot write, at offset .*HTTP 403.*role Storage Object User"),
        pytest.param("status", READ, {"status": 503}, r"gave up after \d+ tries in .*HTTP 503", marks=pytest.mark.slow),
        ("wrong_crc", PUT, {"skip": 0}, "the store did not get what was sent: expected .* bytes with CRC32C"),
        ("corrupt", READ, {"skip": 5}, "the bytes read do not have the CRC32C that the store keeps"),
    ],
)
def test_a_fault_that_lasts_is_told_and_nothing_is_published(
    emulator: GcsEmulator,
    large: Any,
    tmp_path: Path,
    kind: str,
    request_: str,
    options: dict[str, Any],
    message: str,
) -> None:
    emulator.fail(kind, request_, **{"skip": 2, "times": 10_000, **options})
    with pytest.raises(StorageError, match=message):
        run("gs://b/source", TARGET)
    assert "out/podquant.json" not in emulator.data("b")
    assert "out.lock" not in emulator.data("b")
    emulator.faults.clear()
    run("gs://b/source", TARGET)
    run(str(large.path), str(tmp_path / "out"))
    assert artifact(emulator) == local(tmp_path / "out")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("place", "target"), [("gs://none/source", TARGET), ("gs://b/source", "gs://none/out")])
def test_a_bucket_that_is_not_there_is_named(emulator: GcsEmulator, place: str, target: str) -> None:
    with pytest.raises(StorageError, match=r"gs://none/.*HTTP 404.*Check the bucket and the path"):
        run(place, target)


def test_an_overwrite_killed_half_way_is_told_and_finished(emulator: GcsEmulator, source: Any, tmp_path: Path) -> None:
    run(str(source.path), str(tmp_path / "out"))
    run("gs://b/source", TARGET)
    emulator.fail("status", "out.new/podquant.json/rewriteTo", status=403, times=1)
    with pytest.raises(StorageError, match="HTTP 403"):
        run("gs://b/source", TARGET, overwrite=True)
    assert verify_artifact(f"{TARGET}.new") == []
    (told,) = verify_artifact(TARGET)
    assert "killed half-way. The new directory is whole at gs://b/out.new: use that" in told
    assert check_target(TARGET, overwrite=True) is not None
    found = {name: data for name, data in emulator.data("b").items() if name.startswith(("out/", "out.new/"))}
    assert found == {f"out/{name}": data for name, data in local(tmp_path / "out").items()}


def test_a_folder_made_by_the_cloud_console_is_in_nobodys_way(
    emulator: GcsEmulator, source: Any, tmp_path: Path
) -> None:
    run(str(source.path), str(tmp_path / "out"))
    for name in ("out/", "out.new/", "out.receipts/", "source/"):
        emulator.put("b", name, b"")
    run("gs://b/source", TARGET)
    run("gs://b/source", TARGET, overwrite=True)
    assert verify_artifact(TARGET) == []
    assert emulator.data("b")["out/"] == b""
    found = {name: data for name, data in artifact(emulator).items() if name and not name.endswith("/")}
    assert found == local(tmp_path / "out")


@pytest.mark.parametrize("name", ["out.new.receipts/mine", "out.lock", "out/mine"])
def test_objects_of_others_are_left_alone(emulator: GcsEmulator, source: Any, name: str) -> None:
    run("gs://b/source", TARGET)
    emulator.put("b", name, b"precious", age=1000.0)
    before = emulator.data("b")
    with pytest.raises(PodquantError, match=r"did not write|no part of the artifact"):
        run("gs://b/source", TARGET, overwrite=True)
    left = {each: data for each, data in emulator.data("b").items() if each in before}
    assert left == before


def test_a_source_that_is_replaced_between_two_reads_has_changed_and_is_not_missing(
    emulator: GcsEmulator, large: Any
) -> None:
    def replace_it(count: int) -> None:
        for name, data in emulator.data("b").items():
            if name.startswith("source/") and name.endswith(".safetensors"):
                emulator.put("b", name, data[:-1] + b"x")

    with pytest.raises(StorageError, match=r"\.safetensors: changed while it was converted"):
        run("gs://b/source", TARGET, on_progress=replace_it)
    assert "out/podquant.json" not in emulator.data("b")
