"""Hugging Face ids: found in the cache without a connection, and refused with the reason when they are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from podquant.errors import StorageError
from podquant.storage.hub.ids import download_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import sys
from podquant.errors import StorageError
from podquant.storage.hub.ids import download_model
try:
    print(download_model(sys.argv[1], directory=sys.argv[2]))
except StorageError as error:
    print(error)
"""


def offline(model: str, cache: Path) -> str:
    """What a process without a connection prints; huggingface_hub reads this variable once, when it is imported."""
    environment = {"HF_HUB_OFFLINE": "1", "HOME": str(cache)}
    command = [sys.executable, "-c", SCRIPT, model, str(cache)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_a_model_in_the_cache_needs_no_connection(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert offline("org/name", tmp_path) == f"Snapshot(path='{snapshot}', name='org/name@{COMMIT}')"


@pytest.mark.slow
def test_a_model_that_cannot_be_had_offline(tmp_path: Path) -> None:
    assert offline("org/name", tmp_path) == (
        "org/name: no such directory, and as a Hugging Face id it is not in the cache and cannot be downloaded: "
        "check the connection and HF_HUB_OFFLINE."
    )


@pytest.mark.parametrize("model", ["nowhere", "a/b/c", "/a/b", "a b/c"])
def test_what_is_no_id(model: str) -> None:
    with pytest.raises(StorageError, match=r"no such directory, and not a Hugging Face id \(org/name\) either"):
        download_model(model)
