"""More files than a process may open at a time are written and read in turns."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from podquant.errors import StorageError
from podquant.storage.local.descriptors import Descriptors
from podquant.storage.local.store import LocalStore

MANY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from podquant.storage.local.publication import LocalPublication
from podquant.storage.local.store import LocalStore
with LocalPublication(sys.argv[1]) as publication:
    writers = [publication.writer(f"tp-{rank}/weights") for rank in range(300)]
    for turn in range(3):
        for rank, writer in enumerate(writers):
            writer.write(bytes([turn, rank % 256]))
    for writer in writers:
        writer.close()
    publication.publish()
store = LocalStore(sys.argv[1])
for turn in range(2):
    for rank in range(300):
        data = bytearray(6)
        store.read_into(f"tp-{rank}/weights", 0, data)
        assert data == bytes([0, rank % 256, 1, rank % 256, 2, rank % 256]), (rank, data)
store.close()
print("done")
"""


@pytest.mark.slow
def test_three_hundred_files_with_sixty_four_descriptors(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MANY, f"{tmp_path}/out"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "done\n", done.stderr


def test_a_file_in_use_is_not_closed(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 100)
    files = Descriptors(most_open=1)

    def read(number: int) -> bool:
        import os

        with files.use(number, tmp_path / str(number), os.O_RDONLY) as descriptor:
            return all(os.pread(descriptor, 100, 0) == bytes([number]) * 100 for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, [0, 1, 2, 3] * 50))
    files.close_all()


def test_another_file_of_the_name_is_not_read_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    store = LocalStore(str(tmp_path))
    monkeypatch.setattr(store, "_descriptors", Descriptors(most_open=1))
    data = bytearray(1)
    store.read_into("a", 0, data)
    store.read_into("b", 0, data)
    (tmp_path / "new").write_bytes(b"3")
    (tmp_path / "new").rename(tmp_path / "a")
    with pytest.raises(StorageError, match="a: another file has taken its place while it was read"):
        store.read_into("a", 0, data)
    store.close()
