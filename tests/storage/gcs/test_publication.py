"""A directory in a bucket: whole when its last file is there, and never a wrong one."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import pytest

from podquant.errors import StorageError
from podquant.storage.gcs.client import GcsClient
from podquant.storage.gcs.publication import GcsPublication
from tests.storage.gcs.emulator import GcsEmulator

CHUNK = 256 << 10
DATA = np.random.default_rng(2).integers(0, 256, 3 * CHUNK + 7, np.uint8)
WHOLE = {"out/a/weights": DATA.tobytes(), "out/config": b"{}", "out/manifest": b"{1}"}
LAST = "^POST .*multipart"


def new(client: GcsClient, lease_seconds: float = 60.0) -> GcsPublication:
    return GcsPublication("gs://b/out", client, chunk_bytes=CHUNK, lease_seconds=lease_seconds)


def fill(publication: GcsPublication) -> None:
    writer = publication.writer("a/weights")
    writer.write(DATA)
    writer.close()
    publication.write_small("config", b"{}")
    publication.write_small("manifest", b"{1}")


def publish(client: GcsClient) -> None:
    with new(client) as publication:
        fill(publication)
        publication.publish()


def test_the_last_small_file_appears_last_and_nothing_else_stays(emulator: GcsEmulator, client: GcsClient) -> None:
    with new(client) as publication:
        assert not publication.exists()
        fill(publication)
        small = publication.write_small("x", b"12")
        assert (small.name, small.nbytes, small.crc32c) == ("x", 2, google_crc32c.value(b"12"))
        assert set(emulator.data("b")) == {"out.lock", "out/a/weights"}
        publication.publish()
        written = [name for name in emulator.buckets["b"] if name.startswith("out/")]
        assert written == ["out/a/weights", "out/config", "out/manifest", "out/x"]
    assert emulator.data("b") == WHOLE | {"out/x": b"12"}
    assert new(client).exists()
    assert publication.uri == "gs://b/out"


def test_requests_and_bytes_per_file(emulator: GcsEmulator, client: GcsClient) -> None:
    publish(client)
    uploads = emulator.requests("upload")
    lock = len(emulator.requests("ifGenerationMatch=17")) - len(emulator.requests("^DELETE"))
    assert len(uploads) - lock - 1 == 5 + 1 + 1  # a session and four chunks; one request for a small file
    assert len(emulator.requests("^GET /storage/v1/b/b/o/")) == 0
    assert len(emulator.requests("^GET /storage/v1/b/b/o\\?")) == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_removes_everything(emulator: GcsEmulator, client: GcsClient, error: type[BaseException]) -> None:
    def fail() -> None:
        with new(client) as publication:
            fill(publication)
            publication.writer("half").write(DATA)
            raise error

    with pytest.raises(error):
        fail()
    assert emulator.data("b") == {}


def test_a_target_that_is_there_is_refused(emulator: GcsEmulator, client: GcsClient) -> None:
    publish(client)
    assert new(client).exists()
    with pytest.raises(StorageError, match=r"gs://b/out: already exists\. Remove it, or choose another place"):
        new(client).__enter__()
    assert emulator.data("b") == WHOLE


def test_what_is_not_ours_is_never_touched(emulator: GcsEmulator, client: GcsClient) -> None:
    emulator.put("b", "out/theirs", b"1")
    assert new(client).exists()
    with pytest.raises(StorageError, match="gs://b/out: already exists"):
        new(client).__enter__()
    assert emulator.data("b") == {"out/theirs": b"1"}


def test_neighbours_with_a_longer_name_are_nothing_to_it(emulator: GcsEmulator, client: GcsClient) -> None:
    emulator.put("b", "out2/theirs", b"1")
    publish(client)
    assert emulator.data("b") == WHOLE | {"out2/theirs": b"1"}


@pytest.mark.slow
def test_a_killed_run_keeps_others_out_until_its_lease_ends_and_leaves_no_artifact(
    emulator: GcsEmulator, client: GcsClient, caplog: pytest.LogCaptureFixture
) -> None:
    script = """
import time, numpy as np
from podquant.storage.gcs.publication import GcsPublication
with GcsPublication("gs://b/out", lease_seconds=2.0) as publication:
    publication.write_small("config", b"old")
    publication.writer("stale").close()
    publication.writer("a/weights").write(bytes(20 << 20))
    print("ready", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.kill()
    assert set(emulator.data("b")) == {"out.lock", "out/stale"}
    assert not new(client).exists()
    with new(client, lease_seconds=2.0) as publication:
        assert f"locked by process {child.pid} on host" in caplog.text
        assert set(emulator.data("b")) == {"out.lock"}
        fill(publication)
        publication.publish()
    assert emulator.data("b") == WHOLE


def test_of_two_jobs_one_writes(emulator: GcsEmulator, client: GcsClient) -> None:
    def run(_: int) -> str:
        try:
            publish(client)
        except StorageError as error:
            return str(error)
        return "done"

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(4)))
    assert results.count("done") == 1
    assert all("is writing there" in text or "already exists" in text for text in results if text != "done")
    assert emulator.data("b") == WHOLE


@pytest.mark.parametrize(
    ("kind", "request_", "options"),
    [
        ("lost", LAST, {"times": 4}),
        ("lost", "upload_id", {"times": 3}),
        ("status", ".", {"status": 503, "times": 12}),
        ("status", ".", {"status": 429, "times": 12}),
        ("reset", "^POST", {"times": 3}),
        ("reset", "upload_id", {"times": 3, "after": 100_000}),
        ("stall", "^POST", {"times": 2}),
        ("short", "upload_id", {"times": 3, "after": 1000}),
    ],
)
def test_transient_faults_change_nothing(
    emulator: GcsEmulator, client: GcsClient, kind: str, request_: str, options: dict[str, int]
) -> None:
    emulator.fail(kind, request_, **options)
    publish(client)
    assert emulator.data("b") == WHOLE
    assert all(fault.times == 0 for fault in emulator.faults)


@pytest.mark.parametrize(
    ("kind", "request_", "skip"),
    [
        ("status", "uploadType=resumable", 0),
        ("status", "^PUT .*upload_id", 2),
        ("corrupt", "^PUT .*upload_id", 2),
        ("wrong_crc", "^PUT .*upload_id", 3),
        *((kind, LAST, skip) for kind in ("status", "corrupt", "wrong_crc") for skip in (1, 3)),
    ],
)
def test_a_final_fault_at_any_file_publishes_nothing(
    emulator: GcsEmulator, client: GcsClient, kind: str, request_: str, skip: int
) -> None:
    """Small writes are: the lock (0), the configuration (1), the lock once more (2), the manifest (3)."""
    fault = emulator.fail(kind, request_, skip=skip, status=403)
    with pytest.raises(StorageError, match=r"HTTP 403|CRC32C"):
        publish(client)
    assert fault.times == 0
    assert emulator.data("b") == {}


def test_a_run_that_lost_its_lock_publishes_nothing(emulator: GcsEmulator, client: GcsClient) -> None:
    with new(client) as publication:
        fill(publication)
        emulator.put("b", "out.lock", b"theirs")
        with pytest.raises(StorageError, match="this run lost its lock"):
            publication.publish()
    assert emulator.data("b") == {"out.lock": b"theirs"}


def test_a_run_that_loses_its_lock_with_the_last_write_takes_it_back(emulator: GcsEmulator, client: GcsClient) -> None:
    with new(client) as publication:
        fill(publication)
        # The second write of the lock during publish() is refused as if another had taken it over.
        emulator.fail("status", r"ifGenerationMatch=17", status=412, skip=1)
        with pytest.raises(StorageError, match="this run lost its lock"):
            publication.publish()
        assert "out/manifest" not in emulator.data("b")
    assert {name for name in emulator.data("b") if name.startswith("out/")} == set()


def test_a_file_that_another_changed_is_noticed(emulator: GcsEmulator, client: GcsClient) -> None:
    with new(client) as publication:
        fill(publication)
        emulator.put("b", "out/a/weights", DATA[::-1].tobytes())
        with pytest.raises(
            StorageError, match=r"out/a/weights: expected 786,439 bytes with CRC32C \w+, as written, got"
        ):
            publication.publish()
    assert set(emulator.data("b")) == {"out/a/weights"}


def test_a_file_that_another_added_is_noticed(emulator: GcsEmulator, client: GcsClient) -> None:
    with new(client) as publication:
        fill(publication)
        emulator.put("b", "out/theirs", b"1")
        with pytest.raises(StorageError, match=r"gs://b/out: holds files that this run did not write: theirs"):
            publication.publish()
        emulator.put("b", "out/manifest", b"1")
        with pytest.raises(StorageError, match=r"gs://b/out/manifest: already exists"):
            publication.publish()
    assert set(emulator.data("b")) == {"out/theirs", "out/manifest"}


def test_an_open_file_or_no_small_file_cannot_be_published(client: GcsClient) -> None:
    with new(client) as publication:
        publication.writer("a").write(b"1")
        with pytest.raises(StorageError, match=r"gs://b/out: still being written: a\. Close before publishing"):
            publication.publish()
    with new(client) as publication, pytest.raises(StorageError, match="no file marks it as complete"):
        publication.publish()


def test_a_name_is_written_once_and_stays_inside(client: GcsClient) -> None:
    with new(client) as publication:
        publication.writer("a").close()
        with pytest.raises(StorageError, match=r"gs://b/out/a: cannot create: this run is writing it, or has"):
            publication.write_small("a", b"1")
        with pytest.raises(StorageError, match=r"'\.\./a' is not a name inside this directory"):
            publication.writer("../a")


def test_a_whole_bucket_is_no_target(client: GcsClient) -> None:
    with pytest.raises(StorageError, match="gs://b/: cannot fill a whole bucket"):
        GcsPublication("gs://b/", client)


@pytest.mark.slow
def test_other_processes_write_through_a_staging_and_tries_do_not_meet(
    emulator: GcsEmulator, client: GcsClient
) -> None:
    script = """
import pickle, sys
staging = pickle.loads(bytes.fromhex(sys.argv[1]))
killed, slow, fast = (staging.writer("a/weights") for _ in range(3))
data = bytes(range(256)) * 3000
killed.write(data[:500_000])
slow.write(data[:500_000])
fast.write(data)
fast.close()
slow.write(data[500_000:])
slow.close()
print(slow.nbytes, slow.crc32c == fast.crc32c)
"""
    with new(client) as publication:
        text = pickle.dumps(publication.staging).hex()
        done = subprocess.run(
            [sys.executable, "-c", script, text], capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout == "768000 True\n"
        publication.write_small("manifest", b"{1}")
        publication.publish()
    assert emulator.data("b") == {"out/a/weights": bytes(range(256)) * 3000, "out/manifest": b"{1}"}


def test_what_a_staging_wrote_goes_with_a_failed_run(emulator: GcsEmulator, client: GcsClient) -> None:
    with new(client) as publication:
        writer = publication.staging.writer("a")
        writer.write(b"1")
        writer.close()
        assert "out/a" in emulator.data("b")
    assert emulator.data("b") == {}
