"""Conversions in processes of their own: killed, on small disks, under limits."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from podquant.artifact.verify import verify_artifact
from podquant.conversion.run import convert

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from pathlib import Path
from podquant.checkpoint.index import Checkpoint
from podquant.config.rules import load_quantization_config
from podquant.conversion.plan import plan_conversion
from podquant.conversion.run import convert
source, out, then = sys.argv[1:4]
checkpoint = Checkpoint.open(source)
plan = plan_conversion(checkpoint, load_quantization_config("int8.yaml"), source_name="x")
done = 0
def on_progress(count):
    global done
    done += count
    if done > plan.bytes_in // 2:
        exec(then)
convert(checkpoint, plan, out, threads=2, window_bytes=512, on_progress=on_progress)
"""


def run_child(source: Path, out: Path, then: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-c", SCRIPT, str(source), str(out), then]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_killed_run_leaves_no_artifact_and_the_next_one_works(source: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = run_child(source.path, out, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    checkpoint, plan = source.plan("int8.yaml")
    convert(checkpoint, plan, str(out), threads=2)
    assert verify_artifact(str(out)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def small_disk(place: Path, size: str) -> list[str]:
    place.mkdir()
    mount = f'mount -t tmpfs -o size={size} tmpfs "{place}" && "$@"; ls -A "{place}" >&2'
    prefix = ["unshare", "-Urm", "sh", "-c", mount, "sh"]
    try:
        possible = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("this machine does not allow a file system to be mounted")
    return prefix


def test_a_disk_that_is_too_small_is_refused_before_it_is_written(source: Any, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    done = run_child(source.path, place / "out", "pass", *small_disk(place, "1000k"))
    assert "StorageError" in done.stderr
    assert f"{place}/out: the disk is too small: the artifact takes" in done.stderr
    assert re.search(r"1,0\d\d,\d{3} are free", done.stderr)


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(source: Any, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    fill = f"""
import os
if not os.path.exists({str(place / "hog")!r}):
    with open({str(place / "hog")!r}, "wb") as hog:
        try:
            hog.write(bytes(1 << 22))
        except OSError:
            pass
"""
    done = run_child(source.path, place / "out", fill, *small_disk(place, "2m"))
    assert "StorageError" in done.stderr
    assert "No space left on device (ENOSPC)" in done.stderr
    assert done.stderr.splitlines()[-1] == "hog"


def test_a_file_larger_than_allowed_leaves_nothing(source: Any, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    done = run_child(source.path, tmp_path / "out", limit)
    assert "StorageError" in done.stderr
    assert "(EFBIG)" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
