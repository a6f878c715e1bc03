from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from podquant.errors import StorageError
from podquant.storage.local.store import LocalStore

RunPython = Callable[[str, Path], str]


def test_lists_files_below_and_links_to_files_but_no_broken_links(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "d").write_bytes(b"12")
    (tmp_path / "a").symlink_to(tmp_path / "b" / "c" / "d")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    assert list(LocalStore(str(tmp_path)).list().items()) == [("a", 2), ("b/c/d", 2)]


def test_reads_ranges_into_bytearrays_memoryviews_and_arrays(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(100)))
    store = LocalStore(str(tmp_path))
    array = np.zeros((2, 3), np.uint8)
    store.read_into("a", 10, array)
    assert array.tolist() == [[10, 11, 12], [13, 14, 15]]
    data = bytearray(4)
    store.read_into("a", 96, memoryview(data)[1:])
    assert data == bytes([0, 96, 97, 98])
    store.read_into("a", 100, bytearray())
    store.read_into("a", 0, np.zeros((0, 3), np.uint8))
    assert store.size("a") == 100


def test_many_threads_read_one_store(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    (tmp_path / "a").write_bytes(data.tobytes())
    store = LocalStore(str(tmp_path))
    out = np.zeros_like(data)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda at: store.read_into("a", at, out[at : at + 4096]), range(0, 1 << 20, 4096)))
    np.testing.assert_array_equal(out, data)


def test_a_short_read_tells_file_offset_wanted_and_got(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    expected = f"{tmp_path}/a: the file ends early: wanted 1,004 bytes at offset 3, got 2. It is truncated"
    with pytest.raises(StorageError, match=re.escape(expected)):
        LocalStore(str(tmp_path)).read_into("a", 3, bytearray(1004))


def test_a_file_replaced_while_open_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    store = LocalStore(str(tmp_path))
    first, second = bytearray(1), bytearray(2)
    store.read_into("a", 0, first)
    (tmp_path / "b").write_bytes(b"new")
    os.replace(tmp_path / "b", tmp_path / "a")
    store.read_into("a", 1, second)
    assert first + second == b"old"


def test_close_gives_the_descriptors_back_and_ends_reading(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    before = set(os.listdir("/proc/self/fd"))
    store = LocalStore(str(tmp_path))
    store.read_into("a", 0, bytearray(1))
    store.close()
    store.close()
    assert set(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(StorageError, match=r"/a: read after its store was closed"):
        store.read_into("a", 0, bytearray(1))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    where = re.escape(f"{tmp_path}/no: cannot ")
    with pytest.raises(StorageError, match=where + r"read the size: .*\(ENOENT\)"):
        store.size("no")
    with pytest.raises(StorageError, match=where + r"read: .*\(ENOENT\)"):
        store.read("no", 99)
    with pytest.raises(StorageError, match=where + r"read at offset 1,000: .*\(ENOENT\)"):
        store.read_into("no", 1000, bytearray(1))


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "b/../../a", "", "a//b", "./a", "a\0"])
def test_names_cannot_lead_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "root").mkdir()
    with pytest.raises(StorageError, match="is not a name inside this directory"):
        LocalStore(f"{tmp_path}/root").read(name, 99)


@pytest.mark.parametrize(("name", "found"), [("file", "a file"), ("none", "nothing")])
def test_the_place_must_be_a_directory(tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=re.escape(f"{tmp_path}/{name}: expected a directory, found {found}.")):
        LocalStore(f"{tmp_path}/{name}")


@pytest.mark.slow
def test_a_directory_that_may_not_be_read_is_named(tmp_path: Path, run_unprivileged: RunPython) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    script = """
import sys
from podquant.errors import StorageError
from podquant.storage.local.store import LocalStore
try:
    LocalStore(sys.argv[1]).list()
except StorageError as error:
    print(error)
"""
    assert f"{closed}: cannot list: Permission denied (EACCES)" in run_unprivileged(script, tmp_path)
