"""The same files in each kind of storage, and two fine-tunes of one model that differ in nothing but their weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from podquant.storage.hub import store as hub_store
from podquant.storage.hub.client import HubClient
from tests.storage.gcs.emulator import GcsEmulator
from tests.storage.hub.emulator import HubEmulator

KINDS = ("local", "gs", "hf")
_TIME = 1_700_000_000

Put = Callable[[Path, str], str]
"""Puts a folder's files under a name, in the place of what was there; its URI."""


@contextmanager
def storage(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    """A local directory below `folder`, whose files are all as old; or a bucket; or the hub."""
    if kind == "local":
        yield lambda source, name: _put_locally(source, folder / name)
    elif kind == "gs":
        with GcsEmulator("b") as emulator:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
            yield lambda source, name: _put_in_bucket(emulator, source, name)
    else:
        with HubEmulator() as hub:
            client = HubClient(hub.url)
            monkeypatch.setattr(hub_store, "shared_client", lambda: client)
            yield lambda source, name: _put_on_hub(hub, source, name)
            client.close()


def fine_tune(source: Path, place: Path) -> Path:
    """A copy of a checkpoint with every byte of every tensor changed, and no header."""
    shutil.copytree(source, place)
    for file in place.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        data[begin:] = bytes(byte ^ 1 for byte in data[begin:])
        file.write_bytes(data)
    return place


def _put_locally(source: Path, place: Path) -> str:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    for path in place.iterdir():
        os.utime(path, (_TIME, _TIME))
    return str(place)


def _put_in_bucket(emulator: GcsEmulator, source: Path, name: str) -> str:
    for path in source.iterdir():
        emulator.put("b", f"{name}/{path.name}", path.read_bytes())
    return f"gs://b/{name}"


def _put_on_hub(hub: HubEmulator, source: Path, name: str) -> str:
    hub.push(f"org/{name}", {path.name: path.read_bytes() for path in source.iterdir()})
    return f"hf://org/{name}"
