"""Reading from a bucket: what is asked of the store, and what is made of its failures."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from podquant.errors import StorageError
from podquant.storage.gcs.client import GcsClient, GcsError
from podquant.storage.gcs.store import GcsStore, split_uri
from tests.storage.gcs.emulator import GcsEmulator

DATA = np.random.default_rng(0).integers(0, 256, 20_000_003, np.uint8).tobytes()
MEDIA = "alt=media"


@pytest.fixture
def store(emulator: GcsEmulator, client: GcsClient) -> GcsStore:
    emulator.put("b", "m/config.json", b"{}")
    emulator.put("b", "m/x/weights", DATA)
    emulator.put("b", "m/x/", b"")  # what consoles make for a folder
    emulator.put("b", "model/other", b"1")
    return GcsStore("gs://b/m", client)


def read(store: GcsStore, offset: int = 0, count: int = len(DATA)) -> bytes:
    out = bytearray(count)
    store.read_into("x/weights", offset, out)
    return bytes(out)


def test_one_listing_answers_for_all_files(emulator: GcsEmulator, store: GcsStore) -> None:
    for _ in range(3):
        assert list(store.list().items()) == [("config.json", 2), ("x/weights", len(DATA))]
    assert store.size("x/weights") == len(DATA)
    assert store.uri == "gs://b/m"
    assert [record.request.split("?")[0] for record in emulator.log] == ["GET /storage/v1/b/b/o"]


def test_a_long_listing_comes_in_pages(emulator: GcsEmulator, client: GcsClient) -> None:
    for number in range(25):
        emulator.put("b", f"many/{number:02}", b"x" * number)
    emulator.page_size = 10
    assert GcsStore("gs://b/many/", client).list() == {f"{number:02}": number for number in range(25)}
    assert len(emulator.log) == 3


def test_bytes_read_are_those_asked_for_in_few_requests(emulator: GcsEmulator, store: GcsStore) -> None:
    assert read(store) == DATA
    media = emulator.requests(MEDIA)
    assert len(media) == 3  # 8 MiB each
    assert sum(record.bytes_out for record in media) == len(DATA)
    assert read(store, 12_345, 10) == DATA[12_345:12_355]
    assert emulator.log[-1].bytes_out == 10


def test_reads_go_into_bytearrays_memoryviews_and_arrays(store: GcsStore) -> None:
    array = np.zeros((2, 3), np.uint8)
    store.read_into("x/weights", 10, array)
    assert array.tobytes() == DATA[10:16]
    data = bytearray(4)
    store.read_into("x/weights", 96, memoryview(data)[1:])
    assert data == b"\0" + DATA[96:99]
    store.read_into("x/weights", len(DATA), bytearray())
    assert store.read("config.json", 99) == b"{}"


def test_many_threads_read_one_store(store: GcsStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: read(store, at, min(100_000, len(DATA) - at)), range(0, len(DATA), 100_000)))
    assert b"".join(parts) == DATA


def test_a_read_beyond_the_end_tells_file_offset_wanted_and_got(store: GcsStore) -> None:
    expected = f"gs://b/m/x/weights: the file ends early: wanted 1,000 bytes at offset {len(DATA) - 3:,}, got 3. "
    with pytest.raises(StorageError, match=re.escape(expected)):
        read(store, len(DATA) - 3, 1000)
    with pytest.raises(StorageError, match="got 0"):
        read(store, len(DATA) + 5, 1)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_burst_of_refusals_is_sat_out(emulator: GcsEmulator, store: GcsStore, status: int) -> None:
    emulator.fail("status", MEDIA, status=status, times=6)
    assert read(store) == DATA
    assert len(emulator.requests(MEDIA)) == 9


def test_a_named_time_is_waited_for(emulator: GcsEmulator, store: GcsStore) -> None:
    emulator.fail("status", MEDIA, status=429, headers={"Retry-After": "1"})
    started = time.monotonic()
    assert read(store, 0, 10) == DATA[:10]
    assert time.monotonic() - started >= 1.0


def test_a_dropped_connection_is_taken_up_where_it_dropped(emulator: GcsEmulator, store: GcsStore) -> None:
    emulator.fail("reset", MEDIA, times=2)
    emulator.fail("truncate", MEDIA, after=3 << 20, times=2)
    assert read(store) == DATA
    sent = sum(record.bytes_out for record in emulator.requests(MEDIA))
    assert sent <= len(DATA) * 1.02


def test_a_stalled_read_is_given_up_and_taken_up(emulator: GcsEmulator, store: GcsStore) -> None:
    emulator.fail("stall", MEDIA, after=1 << 20, times=2)
    started = time.monotonic()
    assert read(store) == DATA
    assert time.monotonic() - started < 60  # it stalls for an hour
    assert sum(record.bytes_out for record in emulator.requests(MEDIA)) <= len(DATA) * 1.02


@pytest.mark.slow
def test_a_store_that_never_answers_ends_in_an_error_in_time(emulator: GcsEmulator, store: GcsStore) -> None:
    emulator.fail("stall", MEDIA, times=1000)
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"gs://b/m/x/weights: cannot read at offset 5: gave up after \d+ tries in "):
        read(store, 5, 10)
    assert time.monotonic() - started < 60  # it stalls for an hour


def test_a_lasting_outage_tells_the_last_answer(emulator: GcsEmulator, store: GcsStore) -> None:
    emulator.fail("status", MEDIA, times=1000, message="try later")
    with pytest.raises(StorageError, match=r"the last one: try later \(HTTP 503\)\. Check the connection to the store"):
        read(store)


@pytest.mark.parametrize(
    ("status", "advice"),
    [(400, "STORAGE_EMULATOR_HOST"), (401, "gcloud auth application-default login"), (403, "Storage Object Viewer")],
)
def test_a_final_refusal_is_told_at_once(emulator: GcsEmulator, store: GcsStore, status: int, advice: str) -> None:
    emulator.fail("status", MEDIA, status=status, message="no, because.", times=1000)
    expected = rf"^gs://b/m/x/weights: cannot read at offset 7: no, because \(HTTP {status}\)\. .*{advice}"
    with pytest.raises(GcsError, match=expected) as caught:
        read(store, 7, 1)
    assert caught.value.status == status
    assert len(emulator.requests(MEDIA)) == 1


def test_a_file_that_changes_while_it_is_read_is_an_error(emulator: GcsEmulator, store: GcsStore) -> None:
    assert read(store, 0, 4) == DATA[:4]
    emulator.put("b", "m/x/weights", DATA[::-1])
    with pytest.raises(StorageError, match=r"gs://b/m/x/weights: .*No such object.*changed since it was listed"):
        read(store, 4, 4)


@pytest.mark.slow
def test_a_small_file_is_held_to_its_checksum(emulator: GcsEmulator, store: GcsStore) -> None:
    emulator.fail("corrupt", MEDIA)
    assert store.read("config.json", 99) == b"{}"
    assert len(emulator.requests(MEDIA)) == 2
    emulator.fail("corrupt", MEDIA, times=1000)
    with pytest.raises(StorageError, match=r"m/config.json: cannot read: gave up .* expected CRC32C \w{8}, got \w{8}"):
        store.read("config.json", 99)


def test_a_missing_bucket_place_or_file_is_named(emulator: GcsEmulator, store: GcsStore, client: GcsClient) -> None:
    with pytest.raises(
        StorageError, match=r"gs://none/m/: cannot list: The specified bucket does not exist \(HTTP 404"
    ):
        GcsStore("gs://none/m", client)
    with pytest.raises(StorageError, match="gs://b/config: expected a directory with files, found nothing"):
        GcsStore("gs://b/config", client)
    with pytest.raises(StorageError, match="gs://b/m/no: cannot read: there is no such object"):
        store.size("no")
    with pytest.raises(StorageError, match=r"'\.\./model/other' is not a name inside"):
        store.read("../model/other", 99)


def test_a_closed_store_is_not_read(store: GcsStore) -> None:
    store.close()
    with pytest.raises(StorageError, match="gs://b/m: read after its store was closed"):
        store.read("config.json", 99)


@pytest.mark.parametrize("uri", ["gs://", "gs:///a", "b/a"])
def test_a_uri_names_a_bucket(uri: str) -> None:
    with pytest.raises(StorageError, match="names no bucket"):
        split_uri(uri)
    with pytest.raises(StorageError, match="is not a name inside"):
        split_uri("gs://b/a/../c")


def test_odd_names_arrive_as_they_are(emulator: GcsEmulator, client: GcsClient) -> None:
    for name in ("ä b", "100%25", "a+b?c=d&e#f", "x/y"):
        emulator.put("b", f"odd%2F/{name}", name.encode())
    store = GcsStore("gs://b/odd%2F", client)
    assert {name: store.read(name, 1 << 20).decode() for name in store.list()} == {name: name for name in store.list()}
    assert len(store.list()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["STORAGE_EMULATOR_HOST", "FSSPEC_GCS_ENDPOINT_URL"])
def test_another_process_finds_the_endpoint_and_ends_without_a_warning(emulator: GcsEmulator, variable: str) -> None:
    emulator.put("b", "m/a", b"abc")
    script = "from podquant.storage.store import open_store; print(open_store('gs://b/m').read('a', 99))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={variable: emulator.url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("b'abc'\n", "", 0)


@pytest.mark.slow
def test_a_store_without_an_address_is_told_at_once_and_sat_out_once_it_has_answered(
    emulator: GcsEmulator, client: GcsClient
) -> None:
    with closing(GcsClient()) as first:
        first.base = "http://no-such-host.invalid/storage/v1"
        with pytest.raises(GcsError, match=r"cannot list: no address of no-such-host\.invalid: .* Check the network"):
            GcsStore("gs://b/model", first)
    emulator.put("b", "model/a", b"a")
    store = GcsStore("gs://b/model", client)
    client.base = "http://no-such-host.invalid/storage/v1"
    with pytest.raises(StorageError, match="gave up after"):
        store.read("a", 99)
