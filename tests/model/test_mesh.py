"""Which devices of which processes make a mesh."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from podquant.errors import MeshError
from podquant.model.mesh import choose_devices, exchange_over, make_mesh

# As on a 4x4 of v5e: ids go along rows, a process has a square; on CPUs a process's ids begin at a multiple of 2,048.
SQUARES = [SimpleNamespace(id=i, process_index=i // 8 * 2 + i % 4 // 2) for i in range(16)]
CPUS = [SimpleNamespace(id=2048 * process + i, process_index=process) for i in range(2) for process in range(3)]


@pytest.mark.parametrize("devices", [SQUARES, CPUS], ids=["squares", "cpus"])
def test_devices_of_a_process_lie_side_by_side(devices: list[Any]) -> None:
    chosen = choose_devices(devices, "tpu", len(devices))
    processes = [device.process_index for device in chosen]
    assert processes == sorted(processes)
    assert sorted(device.id for device in chosen) == sorted(device.id for device in devices)


def test_too_few_devices_counts_all_processes() -> None:
    with pytest.raises(MeshError, match=r"--tp-size 8 needs .* these 3 processes together have 6"):
        choose_devices(CPUS, "cpu", 8)


def test_every_process_must_take_part() -> None:
    with pytest.raises(MeshError, match=r"--tp-size 4 .* 2 of 3 processes and leaves process 2 .* use --tp-size 6"):
        choose_devices(CPUS, "cpu", 4)
    assert len(choose_devices(CPUS, "cpu", 5)) == 5


def test_one_process_hears_itself() -> None:
    assert exchange_over(make_mesh("cpu", 2))(b"abc") == [b"abc"]
    assert jax.process_count() == 1
