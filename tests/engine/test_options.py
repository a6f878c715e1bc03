"""Which devices this machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from podquant.engine.options import detect_device


@pytest.mark.parametrize(
    ("files", "device"),
    [
        ([], "cpu"),
        (["nvidiactl"], "cpu"),
        (["nvidia0"], "cuda"),
        (["accel0"], "tpu"),
        (["vfio/0"], "tpu"),
        (["vfio/vfio"], "cpu"),
        (["nvidia0", "accel0"], "tpu"),
    ],
)
def test_devices_are_told_by_their_files(tmp_path: Path, files: list[str], device: str) -> None:
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert detect_device(tmp_path) == device
