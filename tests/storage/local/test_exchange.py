"""A directory takes the place of another: all at once, or so that a run that is killed can be taken up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from podquant.errors import StorageError
from podquant.storage.local import publication as module
from podquant.storage.local.exchange import exchange
from podquant.storage.local.publication import LocalPublication
from podquant.storage.local.store import LocalStore
from tests.storage.local.test_ownership import tree


def publish(target: Path, text: bytes, *, replaces: bool) -> None:
    with LocalPublication(str(target), replaces=("a",) if replaces else None) as publication:
        publication.write_small("a", text)
        publication.publish()


def test_two_directories_change_places(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "x", tmp_path / "y")
    assert tree(tmp_path) == {"x/y": b"", "y/x": b""}
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "x", tmp_path / "none")


@pytest.mark.parametrize("supported", [True, False])
def test_a_directory_is_replaced_whole(tmp_path: Path, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not supported:
        monkeypatch.setattr(module, "exchange", lambda first, second: False)
    publish(tmp_path / "out", b"old", replaces=False)
    publish(tmp_path / "out", b"new", replaces=True)
    assert tree(tmp_path) == {"out/a": b"new"}


def test_files_that_came_meanwhile_are_not_lost(tmp_path: Path) -> None:
    publish(tmp_path / "out", b"old", replaces=False)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"out: holds files that are no part of what is to be replaced: notes\.txt"):
        publish(tmp_path / "out", b"new", replaces=True)
    assert tree(tmp_path) == {"out/a": b"old", "out/notes.txt": b"mine"}


KILLED = """
import os, signal, sys
from pathlib import Path
from podquant.storage.local import publication as module
if sys.argv[2] == "renames":
    module.exchange = lambda first, second: False
rename, count = os.rename, [0]
def killing(*paths):
    rename(*paths)
    count[0] += 1
    if count[0] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = killing
if sys.argv[2] == "exchange":
    swap = module.exchange
    def killing_swap(*paths):
        swap(*paths)
        os.kill(os.getpid(), signal.SIGKILL)
    module.exchange = killing_swap
with module.LocalPublication(sys.argv[1], replaces=("a",)) as publication:
    publication.write_small("a", b"new")
    publication.publish()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "turn"), [("exchange", 0), ("renames", 1), ("renames", 2)])
def test_killed_while_it_replaces_one_is_whole_and_found(tmp_path: Path, how: str, turn: int) -> None:
    out = tmp_path / "out"
    publish(out, b"old", replaces=False)
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), how, str(turn)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    if out.exists():
        assert LocalStore(str(out)).list() == {"a": 3}
        assert (out / "a").read_bytes() == b"new"
    else:
        with pytest.raises(StorageError, match=r"killed, and .*/out\.replaced has what was there: rename it"):
            LocalStore(str(out))
        assert (tmp_path / "out.replaced" / "a").read_bytes() == b"old"
    publish(out, b"newer", replaces=True)
    assert tree(tmp_path) == {"out/a": b"newer"}
    assert os.listdir(tmp_path) == ["out"]
