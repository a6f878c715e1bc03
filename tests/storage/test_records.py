"""Small documents beside a publication, on a disk and in a bucket."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from podquant.errors import StorageError
from podquant.storage.records import Records, open_records
from tests.storage.gcs.emulator import GcsEmulator


@pytest.fixture(params=["local", "gs"])
def records(request: pytest.FixtureRequest, tmp_path: Path, emulator: GcsEmulator) -> Records:
    assert emulator.url
    return open_records("gs://b/deep/out.receipts" if request.param == "gs" else f"{tmp_path}/deep/out.receipts")


def test_the_last_of_a_name_counts(records: Records) -> None:
    assert records.read() == {}
    records.write("one", b"1")
    records.write("two", b"22")
    pickle.loads(pickle.dumps(records)).write("one", b"111")
    records.write("one", b"111")
    assert records.read() == {"one": b"111", "two": b"22"}
    records.remove(["one", "never"])
    assert records.read() == {"two": b"22"}
    records.clear()
    records.clear()
    assert records.read() == {}


def test_many_write_at_once(records: Records) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: records.write(f"r{number % 10}", b"%d" % (number % 10)), range(40)))
    assert records.read() == {f"r{number}": b"%d" % number for number in range(10)}


def test_several_that_write_differently_leave_one_whole(records: Records) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: records.write("r", b"%d" % number * 1000), range(8)))
    (found,) = records.read().values()
    assert found in {b"%d" % number * 1000 for number in range(8)}


def test_names_stay_inside(records: Records) -> None:
    with pytest.raises(StorageError, match="is not a name inside"):
        records.write("../a", b"")


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    records = open_records(str(tmp_path))
    records.write("a", b"1")
    (tmp_path / ".unfinished-0123").write_bytes(b"ha")
    assert records.read() == {"a": b"1"}


def test_a_place_that_is_no_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    records = open_records(f"{tmp_path}/a/b")
    with pytest.raises(StorageError, match=r"a/b: cannot create.*\((ENOTDIR|EEXIST)\)"):
        records.write("x", b"1")
    assert os.listdir(tmp_path) == ["a"]


def test_a_bucket_that_refuses_is_told(emulator: GcsEmulator) -> None:
    records = open_records("gs://b/r")
    emulator.fail("status", "^POST ", status=403, message="no")
    with pytest.raises(StorageError, match=r"gs://b/r/x: cannot write: no \(HTTP 403\)"):
        records.write("x", b"1")
