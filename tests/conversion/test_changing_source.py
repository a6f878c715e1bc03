"""A source that something writes to while it is converted: never an artifact of two versions, whenever it happens."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
from podquant.errors import StorageError
from podquant.storage.gcs.client import shared_client
from podquant.storage.hub import store as hub_store
from podquant.storage.hub.client import HubClient
from podquant.storage.retry import Patience
from tests.conversion.conftest import tiny_config, tiny_tensors
from tests.storage.gcs.emulator import GcsEmulator
from tests.storage.hub.emulator import HubEmulator

FILES = (
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    *("config.json", "model.safetensors.index.json", "tokenizer.json"),
)


def run(uri: str, target: str, act: Callable[[], None] = lambda: None, at: int | None = None) -> int:
    """Convert in four units, and do something at the `at`-th sign of progress; returns how many there were."""
    signs = 0

    def progress(count: int) -> None:
        nonlocal signs
        if signs == at:
            act()
        signs += 1

    checkpoint = Checkpoint.open(uri)
    plan = plan_conversion(checkpoint, load_quantization_config("int8.yaml"), source_name="s", unit_bytes=20_000)
    assert len(plan.units) == 4
    convert(checkpoint, plan, target, threads=1, window_bytes=8000, on_progress=progress)
    checkpoint.close()
    return signs


def changed(data: bytes) -> bytes:
    """Other bytes of that length, which are as good."""
    return data.replace(b" ", b"\t", 1) if data.startswith(b"{") else data[:-1] + bytes([data[-1] ^ 1])


def write_in_place(path: Path) -> None:
    """Not even the time of the last change tells."""
    before = path.stat()
    path.write_bytes(changed(path.read_bytes()))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_another_there(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(changed(path.read_bytes()))
    shutil.copystat(path, other)
    os.replace(other, path)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("change", [write_in_place, put_another_there, cut_short, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_on_a_disk_it_is_told_which_file_has_changed(
    source: Any, tmp_path: Path, change: Callable[[Path], None], name: str
) -> None:
    signs = run(str(source.path), str(tmp_path / "whole"))
    assert signs > 8  # several in each unit
    for at in range(signs):
        source.write(tiny_tensors(), tiny_config())
        out = tmp_path / f"{at}"
        with pytest.raises(StorageError) as raised:
            run(str(source.path), str(out), lambda: change(source.path / name), at)
        text = str(raised.value)
        assert f"{source.path}/{name}: " in text
        assert re.search("while it was|ends early|ENOENT", text), text
        assert not out.exists()


def test_what_to_do_is_said_and_is_true(source: Any, tmp_path: Path) -> None:
    change = lambda: write_in_place(source.path / FILES[1])  # noqa: E731
    expected = f"{source.path}/{FILES[1]}: changed while it was converted: what was read of it does not belong"
    last = run(str(source.path), str(tmp_path / "whole")) - 1
    with pytest.raises(StorageError, match=re.escape(expected) + r".*run again with --overwrite to start over$"):
        run(str(source.path), str(tmp_path / "out"), change, last)
    checkpoint, plan = source.plan("int8.yaml", unit_bytes=20_000)
    convert(checkpoint, plan, str(tmp_path / "out"), threads=1, overwrite=True)
    checkpoint, plan = source.plan("int8.yaml", unit_bytes=20_000)
    convert(checkpoint, plan, str(tmp_path / "after"), threads=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "after")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [FILES[1], "config.json", "tokenizer.json"])
def test_in_a_bucket_it_is_told_which_object_has_changed(
    source: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def put_all() -> None:
        for path in source.path.iterdir():
            emulator.put("b", f"source/{path.name}", path.read_bytes())

    with GcsEmulator("b") as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        put_all()
        shared_client().patience = Patience(deadline=2.0)
        signs = run("gs://b/source", "gs://b/whole")
        data = changed((source.path / name).read_bytes())
        for at in range(signs):
            put_all()
            with pytest.raises(StorageError, match=rf"gs://b/source/{name}: (changed while it was|cannot read)"):
                run("gs://b/source", f"gs://b/{at}", lambda: void(emulator.put("b", f"source/{name}", data)), at)
            assert f"{at}/podquant.json" not in emulator.data("b")


def void(_: object) -> None:
    """For what is done, not returned."""


def test_from_the_hub_the_commit_is_converted_that_it_began_with(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in source.path.iterdir()}
    pushed = {name: changed(data) for name, data in files.items()}
    with HubEmulator() as hub:
        client = HubClient(hub.url)
        monkeypatch.setattr(hub_store, "shared_client", lambda: client)
        hub.push("org/name", files)
        signs = run("hf://org/name", str(tmp_path / "whole"))
        for at in range(signs):
            hub.push("org/name", files)
            run("hf://org/name", str(tmp_path / f"{at}"), lambda: void(hub.push("org/name", pushed)), at)
            assert contents(tmp_path / f"{at}") == contents(tmp_path / "whole")
        client.close()
