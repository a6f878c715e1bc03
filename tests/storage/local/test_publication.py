from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from podquant.errors import StorageError
from podquant.storage.local.ownership import mark
from podquant.storage.local.publication import LocalPublication

RunPython = Callable[[str, Path], str]

# Writes a file into a publication until something stops it, then tells the error.
FILL = """
import os, sys
from podquant.errors import StorageError
from podquant.storage.local.publication import LocalPublication
place = sys.argv[1] + "/deep/out"
try:
    with LocalPublication(place) as publication:
        writer = publication.writer("big")
        for _ in range(8):
            writer.write(bytes(100_000))
except StorageError as error:
    print(error)
print(os.listdir(os.path.dirname(place)) if os.path.isdir(os.path.dirname(place)) else None)
"""


def test_the_target_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with LocalPublication(str(target)) as publication:
        writer = publication.writer("tp-00-of-02/weights")
        writer.write(b"abc")
        writer.write(b"")
        writer.write(np.arange(6, dtype=np.uint8).reshape(2, 3))
        writer.write(memoryview(bytearray(b"xyz")))
        writer.close()
        writer.close()
        small = publication.write_small("manifest", b"{}")
        assert not target.exists()
        publication.publish()
        assert (target / "manifest").exists()
    assert (target / "tp-00-of-02" / "weights").read_bytes() == b"abc\0\1\2\3\4\5xyz"
    assert (writer.name, writer.nbytes) == ("tp-00-of-02/weights", 12)
    assert writer.crc32c == google_crc32c.value(b"abc\0\1\2\3\4\5xyz")
    assert (small.name, small.nbytes, small.crc32c) == ("manifest", 2, google_crc32c.value(b"{}"))
    assert os.listdir(target.parent) == ["out"]


def test_the_checksum_of_a_large_write_is_that_of_all_its_bytes(tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(0, 256, 9_000_001, np.uint8)
    with LocalPublication(f"{tmp_path}/out") as publication:
        writer = publication.writer("a")
        writer.write(data)
        writer.close()
        assert (tmp_path / "out.partial" / "a").read_bytes() == data.tobytes()
    assert writer.crc32c == google_crc32c.value(data.tobytes())


def test_the_checksum_is_castagnoli(tmp_path: Path) -> None:
    with LocalPublication(f"{tmp_path}/out") as publication:
        assert publication.write_small("a", b"123456789").crc32c == 0xE3069283  # the check value of RFC 3720's CRC32C


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_removes_everything(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with LocalPublication(f"{tmp_path}/out") as publication:
            publication.writer("a/b").write(b"123")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fail()
    assert os.listdir(tmp_path) == []


def test_leaving_without_publishing_removes_everything(tmp_path: Path) -> None:
    with LocalPublication(f"{tmp_path}/out") as publication:
        publication.write_small("a", b"123")
    assert os.listdir(tmp_path) == []


def test_descriptors_are_given_back_after_an_error(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with LocalPublication(f"{tmp_path}/out") as publication:
        publication.writer("a")
        publication.writer("b").close()
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_taken_target_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_bytes(b"mine")
    else:
        target.mkdir()
        (target / "mine").touch()
    publication = LocalPublication(str(target))
    assert publication.exists()
    with pytest.raises(StorageError, match=re.escape(f"{target}: already exists. Remove it")), publication:
        raise AssertionError("entered")
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_directory_is_no_obstacle_even_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    publication = LocalPublication(f"{tmp_path}/link")
    assert publication.uri == f"{tmp_path}/real"
    assert not publication.exists()
    with publication:
        publication.write_small("a", b"1")
        publication.publish()
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "real") == ["a"]


def test_a_mount_point_is_refused() -> None:
    with pytest.raises(StorageError, match="/proc: cannot replace a mount point"), LocalPublication("/proc"):
        raise AssertionError("entered")


def test_a_target_that_appears_meanwhile_is_never_overwritten(tmp_path: Path) -> None:
    with LocalPublication(f"{tmp_path}/out") as publication:
        publication.write_small("a", b"1")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
        with pytest.raises(StorageError, match=r"out: cannot rename out\.partial to it: .*\(ENOTEMPTY\)"):
            publication.publish()
    assert os.listdir(tmp_path / "out") == ["theirs"]
    assert os.listdir(tmp_path) == ["out"]


def test_an_open_file_cannot_be_published(tmp_path: Path) -> None:
    with LocalPublication(f"{tmp_path}/out") as publication:
        publication.writer("a").write(b"1")
        with pytest.raises(StorageError, match=r"still being written: a\. Close before publishing"):
            publication.publish()
    assert os.listdir(tmp_path) == []


def test_a_name_is_written_once_and_stays_inside(tmp_path: Path) -> None:
    with LocalPublication(f"{tmp_path}/out") as publication:
        publication.writer("a").close()
        with pytest.raises(StorageError, match=r"out\.partial/a: cannot create: File exists"):
            publication.writer("a")
        with pytest.raises(StorageError, match=r"'\.\./a' is not a name inside this directory"):
            publication.writer("../a")


def test_a_closed_file_takes_nothing_more(tmp_path: Path) -> None:
    with LocalPublication(f"{tmp_path}/out") as publication:
        writer = publication.write_small("a", b"1")
        with pytest.raises(StorageError, match=r"out\.partial/a: written to after it was closed"):
            writer.write(b"2")


@pytest.mark.slow
def test_another_run_is_refused_until_killed_and_its_leftovers_are_removed(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from podquant.storage.local.publication import LocalPublication\n"
        "with LocalPublication(sys.argv[1]) as publication:\n"
        "    publication.writer('half').write(bytes(1000))\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    target = f"{tmp_path}/out"
    with subprocess.Popen([sys.executable, "-c", script, target], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(StorageError, match=rf"out: process {child.pid} on host \S+ \(since .* is writing there"):
            LocalPublication(target).__enter__()
        assert (tmp_path / "out.partial" / "half").stat().st_size == 1000
        child.send_signal(signal.SIGKILL)
    assert sorted(os.listdir(tmp_path)) == ["out.partial", "out.partial.lock"]
    with LocalPublication(target) as publication:
        assert os.listdir(tmp_path / "out.partial") == [".podquant"]
        publication.write_small("a", b"1")
        publication.publish()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["a"]


@pytest.mark.slow
def test_a_full_disk_tells_file_wanted_and_free_and_leaves_nothing(
    tmp_path: Path, run_on_small_disk: RunPython
) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    told = run_on_small_disk(FILL, place).splitlines()
    assert re.fullmatch(
        rf"{place}/deep/out\.partial/big: cannot write, at offset 2\d\d,\d\d\d, [\d,]+ bytes \([\d,]+ bytes free\): "
        r"No space left on device \(ENOSPC\)\. Free space there, or choose a place with more\.",
        told[0],
    )
    assert told[1:] == ["[]"]


@pytest.mark.slow
def test_a_limit_on_file_size_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n"
    command = [sys.executable, "-W", "error", "-c", limit + FILL, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "out.partial/big: cannot write, at offset 150,000, 50,000 bytes" in told
    assert "(EFBIG)" in told
    assert told.endswith("\n[]\n")


@pytest.mark.slow
def test_a_place_without_permission_is_told(tmp_path: Path, run_unprivileged: RunPython) -> None:
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)
    told = run_unprivileged(FILL, place)
    assert f"{place}/deep: cannot create the directory: Permission denied (EACCES). Give this user access" in told
    (place / "deep").mkdir(mode=0o555)
    told = run_unprivileged(FILL, place)
    assert f"{place}/deep/out.partial.lock: cannot lock: Permission denied (EACCES)" in told
    assert os.listdir(place / "deep") == []


@pytest.mark.slow
def test_leftovers_that_cannot_be_removed_are_told(tmp_path: Path, run_unprivileged: RunPython) -> None:
    left = tmp_path / "deep" / "out.partial"
    left.mkdir(parents=True)
    (left / "a").touch()
    mark(left)
    left.chmod(0o555)
    told = run_unprivileged(FILL, tmp_path)
    assert f"{left}: cannot remove what an earlier run left: Permission denied (EACCES)" in told
    assert sorted(os.listdir(left)) == [".podquant", "a"]


def test_other_processes_write_through_a_staging_and_tries_do_not_meet(tmp_path: Path) -> None:
    with LocalPublication(f"{tmp_path}/out") as publication:
        staging = pickle.loads(pickle.dumps(publication.staging))
        killed, slow, fast = (staging.writer("a/w") for _ in range(3))
        killed.write(b"12")
        slow.write(b"12")
        fast.write(b"123")
        fast.close()
        assert (tmp_path / "out.partial" / "a" / "w").read_bytes() == b"123"
        slow.write(b"3")
        slow.close()
        publication.write_small("m", b"{}")
        publication.publish()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "out/a/w",
        "out/m",
    ]
    assert (tmp_path / "out" / "a" / "w").read_bytes() == b"123"
    with pytest.raises(StorageError, match=r"cannot finish writing .*\(ENOENT\)"):
        killed.close()


def test_a_staging_keeps_names_inside_and_tells_that_it_is_gone(tmp_path: Path) -> None:
    with LocalPublication(f"{tmp_path}/out") as publication:
        staging = publication.staging
        with pytest.raises(StorageError, match="is not a name inside"):
            staging.writer("../a")
    (tmp_path / "out.partial").touch()
    with pytest.raises(StorageError, match=r"out\.partial/a: cannot create: .*\((ENOTDIR|EEXIST)\)"):
        staging.writer("a")
