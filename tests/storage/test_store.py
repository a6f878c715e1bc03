from __future__ import annotations

import re
from pathlib import Path

import pytest

from podquant.errors import StorageError
from podquant.storage.store import open_store


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_opens_a_directory_by_path_or_file_uri(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "a").write_bytes(b"xyz")
    store = open_store(f"{prefix}{tmp_path}")
    assert store.uri == str(tmp_path)
    assert store.read("a", 99) == b"xyz"


def test_opens_a_directory_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert open_store("~/m").uri == f"{tmp_path}/m"


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        (
            "s3://bucket/model",
            "s3://bucket/model: unknown kind of storage 's3'. Expected a local directory, or gs://….",
        ),
        ("gs://", "'gs://' names no bucket. Expected gs://bucket/path."),
        ("", "'' names no place"),
        ("file://", "'file://' names no place"),
        ("a\0b", "names no place"),
    ],
)
def test_refuses_other_places(uri: str, text: str) -> None:
    with pytest.raises(StorageError, match=re.escape(text)):
        open_store(uri)
