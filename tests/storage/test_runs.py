"""Checksums of ranges: what was read of a file, what is left to read, and whether it is the file that was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from podquant.storage.local.store import LocalStore
from podquant.storage.runs import RecordingStore, Run, Whole, adds_up, gaps, joined

DATA = np.random.default_rng(0).bytes(1000)
WHOLE = Whole(1000, google_crc32c.value(DATA))


@pytest.fixture
def store(tmp_path: Path) -> RecordingStore:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(DATA)
    return RecordingStore(LocalStore(str(tmp_path)), lambda file: file == "a")


def run(first: int, last: int) -> Run:
    return Run("a", first, last - first, google_crc32c.value(DATA[first:last]))


def test_ranges_in_any_order_make_the_file(store: RecordingStore) -> None:
    for first, last in ((700, 1000), (0, 300), (300, 301), (301, 301), (301, 700)):
        store.read_into("a", first, bytearray(last - first))
    assert store.runs == [Run("a", 0, 1000, WHOLE.crc32c)]
    assert adds_up("a", WHOLE, store.runs)
    assert store.bytes_read == 1000


def test_arrays_of_any_shape_are_read_and_recorded(store: RecordingStore) -> None:
    store.read_into("a", 200, np.empty((10, 5), np.float32))
    assert store.runs == [run(200, 400)]


def test_files_without_a_checksum_are_counted_only(store: RecordingStore) -> None:
    store.read_into("b", 0, bytearray(10))
    assert (store.runs, store.bytes_read) == ([], 10)


def test_neighbours_are_joined_and_others_are_not() -> None:
    other = Run("b", 100, 1, 7)
    assert joined([run(50, 100), other, run(0, 50), run(101, 200)]) == [run(0, 100), run(101, 200), other]


def test_what_several_read_apart_counts_once_and_has_to_be_the_same(store: RecordingStore) -> None:
    store.read_into("a", 0, bytearray(300))
    for _ in range(2):
        with store.apart():
            store.read_into("a", 300, bytearray(100))
    store.read_into("a", 400, bytearray(600))
    runs = store.runs
    assert runs == [run(0, 300), replace(run(300, 400), apart=True), run(400, 1000)]
    assert adds_up("a", WHOLE, runs)
    assert store.bytes_read == 1100
    corrupted = replace(runs[1], crc32c=runs[1].crc32c ^ 1)
    assert not adds_up("a", WHOLE, [*runs, corrupted])
    assert not adds_up("a", WHOLE, [corrupted, *runs])


def test_gaps_are_what_no_run_has() -> None:
    whole = Whole(1000, WHOLE.crc32c, run(0, 10))
    assert gaps("a", whole, [run(20, 500), run(100, 200), run(500, 990)]) == [(10, 10), (990, 10)]
    assert gaps("a", whole, [run(10, 1000)]) == []


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([run(0, 1000)], True),
        ([run(0, 400), run(400, 1000), run(100, 200)], True),
        ([run(0, 400), run(401, 1000)], False),
        ([run(0, 400), Run("a", 400, 600, run(400, 1000).crc32c ^ 1)], False),
        ([run(0, 400), Run("b", 400, 600, run(400, 1000).crc32c)], False),
        ([], False),
    ],
    ids=["whole", "overlap", "hole", "changed", "of another file", "nothing"],
)
def test_a_file_adds_up_only_if_every_byte_was_read_as_written(runs: list[Run], expected: bool) -> None:
    assert adds_up("a", WHOLE, runs) is expected


def test_an_empty_file_adds_up() -> None:
    assert adds_up("a", Whole(0, 0), [])
