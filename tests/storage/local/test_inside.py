"""Links and special files in a directory that strangers made, for every method that reads."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from podquant.errors import StorageError
from podquant.storage.local.store import LocalStore
from podquant.storage.records import open_records

READS: dict[str, Callable[[LocalStore], object]] = {
    "read": lambda store: store.read("file", 99),
    "read_into": lambda store: store.read_into("file", 0, bytearray(1)),
    "size": lambda store: store.size("file"),
    "version": lambda store: store.version("file"),
}
"""Of `file`, which holds `secret`."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory, with a secret beside it."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def assert_refused(place: Path, message: str) -> None:
    for read in READS.values():
        with pytest.raises(StorageError, match=re.escape(f"{place}/file: {message}")):
            read(LocalStore(str(place)))


def assert_read(place: Path) -> None:
    store = LocalStore(str(place))
    assert store.list()["file"] == store.size("file") == 6
    assert store.read("file", 6) == b"secret"
    data = bytearray(6)
    store.read_into("file", 0, data)
    assert data == b"secret"


def make_repository(cache: Path) -> tuple[Path, Path]:
    """A snapshot and the blobs of one repository in a cache."""
    repository = cache / "models--org--name"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    for each in (snapshot, blobs):
        each.mkdir(parents=True)
    return snapshot, blobs


@pytest.mark.parametrize(
    ("links", "also"),
    [
        ({"file": "{place}/../secret"}, ""),
        ({"file": "../secret"}, ""),
        ({"file": "/etc/hostname"}, ""),
        ({"a": "../secret", "file": "a"}, ""),
        ({"up": "..", "file": "up/secret"}, ""),
        ({"file": "../placex/secret"}, "../placex"),
        ({"file": "../blobs/secret"}, "../blobs"),
        ({"file": "../../blobs/secret"}, "../../blobs"),
    ],
    ids=["absolute", "relative", "system", "two links", "folder", "name prefix", "blobs beside", "blobs above"],
)
def test_a_link_that_leads_out_is_refused(place: Path, links: dict[str, str], also: str) -> None:
    """`also`: a further folder with the secret."""
    if also:
        (place / also).mkdir()
        (place / also / "secret").write_text("secret")
    for name, target in links.items():
        (place / name).symlink_to(target.format(place=place))
    assert_refused(place, "leads out of the directory, to ")


def test_a_folder_that_leads_out_is_refused(place: Path) -> None:
    (place / "folder").symlink_to("..")
    assert LocalStore(str(place)).list() == {}
    with pytest.raises(StorageError, match="folder/secret: leads out of the directory"):
        LocalStore(str(place)).read("folder/secret", 99)


def test_a_link_inside_and_a_directory_that_is_a_link_are_read(place: Path) -> None:
    (place / "folder").mkdir()
    (place / "folder" / "real").write_text("secret")
    (place / "file").symlink_to("folder/real")
    (place.parent / "link").symlink_to(place)
    (place.parent / "second").symlink_to("link")
    for each in (place, place.parent / "link", place.parent / "second"):
        assert_read(each)


def test_the_blobs_of_a_snapshot_are_read(tmp_path: Path) -> None:
    snapshot, blobs = make_repository(tmp_path / "cache")
    (blobs / "abc").write_text("secret")
    (snapshot / "file").symlink_to("../../blobs/abc")
    (snapshot / "more").mkdir()
    (snapshot / "more" / "file").symlink_to("../../../blobs/abc")
    (tmp_path / "link").symlink_to(snapshot)
    (tmp_path / "moved").symlink_to(tmp_path / "cache")
    for place in (
        snapshot,
        snapshot / "more",
        tmp_path / "link",
        tmp_path / "moved" / snapshot.relative_to(blobs.parents[1]),
    ):
        assert_read(place)


def test_blobs_that_all_repositories_share_are_read(tmp_path: Path) -> None:
    """huggingface_hub 1.x: a repository's blob is a link to `blobs/HA/HASH` beside all of them."""
    snapshot, blobs = make_repository(tmp_path)
    digest = "ab" * 32
    (tmp_path / "blobs" / "ab").mkdir(parents=True)
    (tmp_path / "blobs" / "ab" / digest).write_text("secret")
    (blobs / "etag").symlink_to(f"../../blobs/ab/{digest}")
    (snapshot / "file").symlink_to("../../blobs/etag")
    assert_read(snapshot)


def test_a_snapshot_reads_no_other_repository_and_no_blob_that_leads_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    snapshot, blobs = make_repository(tmp_path / "cache")
    (tmp_path / "cache" / "models--org--other" / "blobs").mkdir(parents=True)
    (tmp_path / "cache" / "models--org--other" / "blobs" / "abc").write_text("secret")
    (blobs / "out").symlink_to(tmp_path / "secret")
    for target in ("../../blobs/out", "../../../models--org--other/blobs/abc", "../../../../secret"):
        (snapshot / "file").unlink(missing_ok=True)
        (snapshot / "file").symlink_to(target)
        assert_refused(snapshot, "leads out of the directory, to ")


def test_blobs_that_are_a_link_themselves_are_refused(tmp_path: Path) -> None:
    snapshot, blobs = make_repository(tmp_path / "cache")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "abc").write_text("secret")
    blobs.rmdir()
    blobs.symlink_to(tmp_path / "elsewhere")
    (snapshot / "file").symlink_to("../../blobs/abc")
    assert_refused(snapshot, "leads out of the directory, to ")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def _link_to_a_pipe(path: Path) -> None:
    os.mkfifo("pipe")
    path.symlink_to("pipe")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a pipe (FIFO)"),
        (_socket, "a socket"),
        (lambda path: path.mkdir(), "a directory"),
        (_link_to_a_pipe, "a pipe (FIFO)"),
    ],
    ids=["pipe", "socket", "directory", "link to a pipe"],
)
def test_what_is_no_regular_file_is_named_and_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, place: Path, make: Callable[[Path], object], kind: str
) -> None:
    monkeypatch.chdir(place)  # the name of a socket may not be long
    make(Path("file"))
    if kind != "a directory":
        assert LocalStore(str(place)).list()["file"] == 0
    assert_refused(place, f"expected a regular file, found {kind}. Remove it")


def test_a_device_is_refused(place: Path) -> None:
    (place / "file").symlink_to("/dev/zero")
    assert_refused(place, "leads out of the directory, to /dev/zero")


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(place: Path) -> None:
    (place / "file").write_text("secret")
    store = LocalStore(str(place))
    store.read_into("file", 0, bytearray(1))
    store._descriptors.close_all()  # as when many others are read meanwhile
    (place / "file").unlink()
    os.mkfifo(place / "file")
    with pytest.raises(StorageError, match="expected a regular file, found a pipe"):
        store.read_into("file", 0, bytearray(1))


def test_a_loop_of_links_is_an_error(place: Path) -> None:
    (place / "file").symlink_to("file")
    assert LocalStore(str(place)).list() == {}
    assert_refused(place, "cannot read")


def test_a_file_larger_than_its_kind_may_be_is_not_read(place: Path) -> None:
    with open(place / "file", "wb") as file:
        file.truncate(1 << 40)
    expected = f"{place}/file: has 1,099,511,627,776 bytes; at most 1,000 are read of such a file"
    with pytest.raises(StorageError, match=re.escape(expected)):
        LocalStore(str(place)).read("file", 1000)


def test_records_that_are_links_or_pipes_are_refused(tmp_path: Path) -> None:
    records = open_records(str(tmp_path / "records"))
    records.write("a.json", b"{}")
    (tmp_path / "records" / "b.json").symlink_to("/etc/hostname")
    with pytest.raises(StorageError, match=r"b\.json: leads out of the directory"):
        records.read()
    (tmp_path / "records" / "b.json").unlink()
    os.mkfifo(tmp_path / "records" / "b.json")
    with pytest.raises(StorageError, match=r"b\.json: expected a regular file, found a pipe"):
        records.read()
