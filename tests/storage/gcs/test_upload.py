"""Writing one object: whole or not at all, in bounded memory, whatever the connection does."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref

import google_crc32c
import numpy as np
import pytest

from podquant.errors import StorageError
from podquant.storage.gcs.client import GcsClient
from podquant.storage.gcs.objects import Bucket
from podquant.storage.gcs.upload import GcsWriter
from tests.storage.gcs.emulator import GcsEmulator

CHUNK = 1 << 20
DATA = np.random.default_rng(1).integers(0, 256, 4 * CHUNK + 12_345, np.uint8)
PUT = "^PUT .*upload_id"
BEGIN = "uploadType=resumable"
SMALL = "uploadType=multipart"


@pytest.fixture
def bucket(client: GcsClient) -> Bucket:
    return Bucket(client, "b")


def new(bucket: Bucket, name: str = "a") -> GcsWriter:
    return GcsWriter(bucket, f"out/{name}", name, metadata={"k": "v"}, chunk_bytes=CHUNK)


def write(writer: GcsWriter, data: np.ndarray = DATA, step: int = 700_001) -> None:
    for start in range(0, len(data), step):
        writer.write(data[start : start + step])
    writer.close()


def check(emulator: GcsEmulator, writer: GcsWriter, data: np.ndarray = DATA) -> None:
    assert emulator.data("b")["out/a"] == data.tobytes()
    assert (writer.name, writer.nbytes, writer.crc32c) == ("a", len(data), google_crc32c.value(data.tobytes()))
    assert emulator.buckets["b"]["out/a"].metadata["k"] == "v"
    assert writer.is_closed


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1, 2 * CHUNK, len(DATA)])
def test_what_is_written_arrives_in_few_requests(emulator: GcsEmulator, bucket: Bucket, size: int) -> None:
    writer = new(bucket)
    write(writer, DATA[:size])
    writer.close()
    check(emulator, writer, DATA[:size])
    chunks = -(-size // CHUNK)
    assert len(emulator.log) == (1 if chunks <= 1 else chunks + 1)
    assert sum(record.bytes_in for record in emulator.log) <= size * 1.02 + 1000


def test_an_object_appears_when_it_is_closed(emulator: GcsEmulator, bucket: Bucket) -> None:
    writer = new(bucket)
    writer.write(DATA)
    assert emulator.data("b") == {}
    writer.close()
    check(emulator, writer)
    with pytest.raises(StorageError, match="gs://b/out/a: written to after it was closed"):
        writer.write(b"2")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("status", {"status": 503, "times": 5}),
        ("status", {"status": 429, "times": 5}),
        ("reset", {}),
        ("reset", {"after": 300_000, "times": 3}),
        ("short", {"after": 256 << 10, "times": 3}),
        ("short", {"after": 0, "times": 2}),
        ("lost", {"times": 3}),
        ("stall", {"times": 2}),
    ],
)
@pytest.mark.parametrize("skip", [0, 4])
def test_a_chunk_that_fails_is_sent_again_from_where_the_store_is(
    emulator: GcsEmulator, bucket: Bucket, kind: str, options: dict[str, int], skip: int
) -> None:
    fault = emulator.fail(kind, PUT, skip=skip, **options)
    writer = new(bucket)
    write(writer)
    check(emulator, writer)
    assert fault.times <= options.get("times", 1) - 1


def test_a_connection_that_drops_while_a_chunk_is_sent_costs_a_part_of_it(
    emulator: GcsEmulator, bucket: Bucket
) -> None:
    emulator.fail("reset", PUT, after=900_000, times=2, skip=1)
    writer = new(bucket)
    write(writer)
    check(emulator, writer)
    assert sum(record.bytes_in for record in emulator.requests(PUT)) <= len(DATA) + 2 * CHUNK


@pytest.mark.parametrize("request_", [BEGIN, SMALL])
@pytest.mark.parametrize(("kind", "options"), [("status", {"times": 4}), ("reset", {}), ("lost", {}), ("stall", {})])
def test_the_first_request_is_tried_again(
    emulator: GcsEmulator, bucket: Bucket, request_: str, kind: str, options: dict[str, int]
) -> None:
    fault = emulator.fail(kind, request_, **options)
    data = DATA if request_ == BEGIN else DATA[:1000]
    writer = new(bucket)
    write(writer, data)
    check(emulator, writer, data)
    assert fault.times == 0


@pytest.mark.parametrize(("size", "request_"), [(1000, SMALL), (len(DATA), PUT)])
def test_a_wrong_checksum_from_the_store_is_an_error_and_leaves_nothing(
    emulator: GcsEmulator, bucket: Bucket, size: int, request_: str
) -> None:
    emulator.fail("wrong_crc", request_, times=1, skip=0 if size == 1000 else 4)
    with pytest.raises(StorageError, match=r"out/a: the store did not get what was sent: expected .* The object was"):
        write(new(bucket), DATA[:size])
    assert emulator.data("b") == {}


def test_a_bit_that_flips_under_way_is_noticed(emulator: GcsEmulator, bucket: Bucket) -> None:
    emulator.fail("corrupt", PUT, skip=2)
    with pytest.raises(StorageError, match="the store did not get what was sent"):
        write(new(bucket))
    emulator.fail("corrupt", SMALL)
    with pytest.raises(StorageError, match="doesn't match calculated CRC32C"):
        write(new(bucket), DATA[:10])
    assert emulator.data("b") == {}


@pytest.mark.parametrize("request_", [BEGIN, PUT, SMALL])
def test_a_refusal_is_told_at_once(emulator: GcsEmulator, bucket: Bucket, request_: str) -> None:
    emulator.fail("status", request_, status=403, message="no", times=1000)
    expected = r"gs://b/out/a: cannot (start writing|write, at offset 0, 1,048,576 bytes|write): no \(HTTP 403\)\. Give"
    with pytest.raises(StorageError, match=expected):
        write(new(bucket), DATA[: 1000 if request_ == SMALL else len(DATA)])
    assert len(emulator.requests(request_)) == 1
    assert emulator.data("b") == {}


def test_a_missing_bucket_is_told(emulator: GcsEmulator, client: GcsClient) -> None:
    with pytest.raises(StorageError, match=r"gs://none/out/a: cannot write: The specified bucket does not exist"):
        write(new(Bucket(client, "none")), DATA[:10])


def test_an_upload_that_the_store_forgot_is_an_error(emulator: GcsEmulator, bucket: Bucket) -> None:
    emulator.fail("status", PUT, status=410, message="gone", skip=2)
    with pytest.raises(StorageError, match=r"cannot write, at offset 2,097,152, 1,048,576 bytes: gone \(HTTP 410\)"):
        write(new(bucket))


@pytest.mark.parametrize("size", [1000, len(DATA)])
def test_equal_bytes_that_are_there_already_count_as_written(emulator: GcsEmulator, bucket: Bucket, size: int) -> None:
    emulator.put("b", "out/a", DATA[:size].tobytes(), {"k": "v"})
    writer = new(bucket)
    write(writer, DATA[:size])
    check(emulator, writer, DATA[:size])
    assert len(emulator.requests(PUT)) == 0


@pytest.mark.parametrize("size", [1000, len(DATA)])
def test_other_bytes_are_never_overwritten(emulator: GcsEmulator, bucket: Bucket, size: int) -> None:
    emulator.put("b", "out/a", b"theirs")
    expected = f"gs://b/out/a: another job has written it with other content: expected {size:,} bytes with CRC32C "
    with pytest.raises(StorageError, match=re.escape(expected)):
        write(new(bucket), DATA[:size])
    assert emulator.data("b") == {"out/a": b"theirs"}


def test_an_object_that_appears_while_ours_is_sent(emulator: GcsEmulator, bucket: Bucket) -> None:
    writer = new(bucket)
    writer.write(DATA)
    emulator.put("b", "out/a", b"theirs")
    with pytest.raises(StorageError, match="another job has written it with other content"):
        writer.close()
    assert emulator.data("b") == {"out/a": b"theirs"}


def test_an_upload_given_up_is_forgotten(emulator: GcsEmulator, bucket: Bucket) -> None:
    writer = new(bucket)
    writer.write(DATA)
    writer.abandon()
    assert len(emulator.requests("^DELETE .*upload_id")) == 1
    assert emulator.data("b") == {}
    with pytest.raises(StorageError, match="written to after it was closed"):
        writer.write(b"1")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_object(emulator: GcsEmulator) -> None:
    """The emulator is in this process, the writer in another: its peak must hold some chunks, not 256 MiB."""
    script = """
import pathlib, numpy as np
from podquant.storage.gcs.client import shared_client
from podquant.storage.gcs.objects import Bucket
from podquant.storage.gcs.upload import GcsWriter
def peak():  # not getrusage's ru_maxrss, which begins with that of the process that forked this one
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
bucket = Bucket(shared_client(), "b")
data = np.zeros(4 << 20, np.uint8)
before = peak()
writer = GcsWriter(bucket, "big", "big", metadata={})
for _ in range(64): writer.write(data)
writer.close()
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert len(emulator.data("b")["big"]) == 256 << 20
    assert int(done.stdout) < 64 << 20


def test_an_object_that_is_done_holds_no_memory(bucket: Bucket) -> None:
    """Not even until the garbage collector looks for cycles: a worker writes hundreds, with little else to count."""
    gc.collect()
    gc.disable()
    try:
        writer = new(bucket)
        chunks = [weakref.ref(writer._filling), weakref.ref(writer._sending)]
        write(writer)
        assert [chunk() is None for chunk in chunks] == [True, True]
    finally:
        gc.enable()
