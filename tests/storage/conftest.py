"""Real failures of a file system, provoked in a child process that has its own view of the mounts; and a store of
objects that fails when told to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from podquant.storage.gcs.client import GcsClient
from podquant.storage.retry import Patience
from tests.storage.gcs.emulator import GcsEmulator

RunPython = Callable[[str, Path], str]


def _run(namespace: list[str], prepare: str, script: str, place: Path) -> str:
    command = [
        *namespace,
        "sh",
        "-c",
        f'{prepare} exec "$1" -W error -c "$2" "$3"',
        "sh",
        sys.executable,
        script,
        str(place),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _require(*command: str) -> None:
    try:
        possible = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip(f"this machine does not allow {' '.join(command)}")


@pytest.fixture
def run_on_small_disk(tmp_path: Path) -> RunPython:
    """Runs a Python script with `sys.argv[1]` a directory on a disk of 256 KiB."""
    mount = 'mount -t tmpfs -o size=256k tmpfs "$0"'
    _require("unshare", "-Urm", "sh", "-c", mount, str(tmp_path))
    return lambda script, place: _run(["unshare", "-Urm"], 'mount -t tmpfs -o size=256k tmpfs "$3" &&', script, place)


@pytest.fixture
def run_unprivileged() -> RunPython:
    """Runs a Python script to which permission bits apply, even where the tests run as root."""
    _require("unshare", "-U", "true")
    return lambda script, place: _run(["unshare", "-U"], "", script, place)


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsEmulator]:
    """Cloud Storage on this machine, with an empty bucket `b`; clients made from now on use it."""
    with GcsEmulator("b") as emulator:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator.url)
        yield emulator


@pytest.fixture
def client(emulator: GcsEmulator) -> Iterator[GcsClient]:
    """A client of the emulator that gives up in seconds."""
    client = GcsClient(Patience(connect=1.0, silence=1.0, deadline=4.0, first_wait=0.01, longest_wait=0.1))
    yield client
    client.close()
