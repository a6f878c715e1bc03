"""What podquant did not make stays as it is, whatever its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from podquant.errors import StorageError
from podquant.storage.local.lock import Lock
from podquant.storage.local.ownership import MARKER, claim, is_own, mark, refuse_foreign, remove
from podquant.storage.local.publication import LocalPublication
from podquant.storage.records import open_records


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def a_directory(place: Path) -> None:
    place.mkdir()
    (place / "notes.txt").write_text("mine")


def a_nested_directory(place: Path) -> None:
    (place / "deep").mkdir(parents=True)
    (place / "deep" / "notes.txt").write_text("mine")


def a_file(place: Path) -> None:
    place.write_text("mine")


def a_link(place: Path) -> None:
    elsewhere = place.with_name("elsewhere")
    a_directory(elsewhere)
    mark(elsewhere)
    place.symlink_to(elsewhere)


@pytest.mark.parametrize("make", [a_directory, a_nested_directory, a_file, a_link])
@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_publication_is_refused_where_its_names_are_taken(tmp_path: Path, make, name: str, keep: bool) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / name)
    before = tree(tmp_path)
    with pytest.raises(StorageError, match=rf"{name}: podquant needs this name .* Nothing was touched: move it away"):
        LocalPublication(f"{tmp_path}/out", keep=keep).__enter__()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("make", [a_directory, a_nested_directory, a_file, a_link])
def test_records_are_refused_where_their_name_is_taken(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "out.receipts")
    before = tree(tmp_path)
    records = open_records(f"{tmp_path}/out.receipts")
    for act in (records.read, lambda: records.write("a", b"1"), records.clear):
        with pytest.raises(StorageError, match=r"out\.receipts: podquant needs this name"):
            act()
    assert tree(tmp_path) == before


def test_a_lock_file_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.partial.lock"
    path.write_text("mine")
    lock = Lock(path)
    with pytest.raises(StorageError, match=r"out\.partial\.lock: podquant needs this name for a lock .* did not write"):
        lock.acquire(tmp_path / "out")
    lock.release()
    assert path.read_text() == "mine"


def test_an_empty_directory_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with LocalPublication(f"{tmp_path}/out") as publication:
        publication.write_small("a", b"1")
        publication.publish()
    assert tree(tmp_path) == {"out/a": b"1"}


def test_what_is_removed_in_part_is_still_known(tmp_path: Path) -> None:
    place = tmp_path / "place"
    claim(place)
    (place / "a").mkdir()
    (place / "a" / "b").touch()
    (place / "c").touch()
    assert is_own(place)
    seen = []
    unlink = os.unlink

    def watched(path: str | os.PathLike[str], **options: int) -> None:
        seen.append(Path(path).name)
        unlink(path, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "unlink", watched)
        remove(place)
    assert not place.exists()
    assert seen[-1] == MARKER or MARKER not in seen
    remove(place)
    refuse_foreign(place)
