from __future__ import annotations

import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.flax import save_file as save_flax
from safetensors.numpy import save_file

from podquant.checkpoint.index import Checkpoint
from podquant.checkpoint.reader import read_rows, read_tensor
from podquant.errors import CheckpointError, StorageError

NUMPY = [np.float32, np.float16, np.float64, np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.bool_]
ML = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu]


def _checkpoint(folder: Path, **tensors: Any) -> Checkpoint:
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(str(folder))


@pytest.mark.parametrize("kind", [*NUMPY, *ML])
def test_reads_every_dtype_safetensors_writes(tmp_path: Path, kind: Any) -> None:
    array = np.arange(1, 61).reshape(4, 5, 3).astype(kind)
    checkpoint = _checkpoint(tmp_path, x=array)
    read = read_tensor(checkpoint, "x")
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_reads_bfloat16_that_flax_writes(tmp_path: Path) -> None:
    jax = pytest.importorskip("jax")
    array = jax.numpy.arange(12, dtype=jax.numpy.bfloat16).reshape(3, 4)
    (tmp_path / "config.json").write_text("{}")
    save_flax({"x": array}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(read_tensor(Checkpoint.open(str(tmp_path)), "x"), np.asarray(array))


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (0, 1), (3, 5), (6, 7), (4, 4), (7, 7)])
def test_reads_a_window_of_rows(tmp_path: Path, start: int, stop: int) -> None:
    array = np.arange(7 * 2 * 3).astype(ml_dtypes.bfloat16).reshape(7, 2, 3)
    checkpoint = _checkpoint(tmp_path, a=np.ones(5, np.int8), x=array)
    rows = read_rows(checkpoint.store, checkpoint.tensors["x"], start, stop)
    assert rows.shape == (stop - start, 2, 3)
    np.testing.assert_array_equal(rows, array[start:stop])


def test_reads_scalars_and_empty_tensors(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, s=np.array(2.5, np.float32), e=np.zeros((0, 3), np.int8))
    assert read_tensor(checkpoint, "s").shape == ()
    assert read_tensor(checkpoint, "s") == 2.5
    assert read_tensor(checkpoint, "e").shape == (0, 3)
    assert read_rows(checkpoint.store, checkpoint.tensors["e"], 0, 0).shape == (0, 3)


def test_reads_into_the_callers_memory_without_a_copy(tmp_path: Path) -> None:
    array = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    checkpoint = _checkpoint(tmp_path, x=array)
    buffer = np.zeros((512, 1024), np.float32)
    tracemalloc.start()
    try:
        result = read_rows(checkpoint.store, checkpoint.tensors["x"], 100, 356, out=buffer[:256])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 10  # the window is 1 MiB
    assert np.shares_memory(result, buffer)
    np.testing.assert_array_equal(buffer[:256], array[100:356])
    assert not buffer[256:].any()


def _read_only() -> np.ndarray[Any, Any]:
    array = np.zeros((2, 3), np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "out",
    [np.zeros((3, 3), np.float32), np.zeros((2, 3), np.int32), np.zeros((3, 2), np.float32).T, _read_only()],
    ids=["shape", "dtype", "strides", "read-only"],
)
def test_memory_that_does_not_fit_is_refused(tmp_path: Path, out: np.ndarray[Any, Any]) -> None:
    checkpoint = _checkpoint(tmp_path, x=np.ones((4, 3), np.float32))
    expected = f"tensor 'x': cannot read into {out.dtype}{list(out.shape)}: expected a writable "
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        read_rows(checkpoint.store, checkpoint.tensors["x"], 0, 2, out=out)


@pytest.mark.parametrize(("name", "start", "stop"), [("x", 0, 5), ("x", -1, 2), ("x", 3, 2), ("s", 0, 1)])
def test_rows_that_are_not_there_are_refused(tmp_path: Path, name: str, start: int, stop: int) -> None:
    checkpoint = _checkpoint(tmp_path, x=np.ones((4, 3), np.float32), s=np.array(1, np.int8))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{name}': no rows \[{start}, {stop}\) in"):
        read_rows(checkpoint.store, checkpoint.tensors[name], start, stop)


def test_an_unknown_tensor_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, **{"model.norm.weight": np.ones(1, np.int8)})
    with pytest.raises(CheckpointError, match=r"no tensor 'model.norm.wait'. The nearest name is 'model.norm.weight'."):
        read_tensor(checkpoint, "model.norm.wait")
    with pytest.raises(CheckpointError, match=r"no tensor 'zzz'\.$"):
        read_tensor(checkpoint, "zzz")


def test_a_file_cut_after_opening_names_tensor_and_file(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, x=np.ones((4, 3), np.float32))
    info = checkpoint.tensors["x"]
    os.truncate(tmp_path / "model.safetensors", info.offset + 30)
    expected = (
        rf"tensor 'x': .*/model\.safetensors: the file ends early: wanted 24 bytes at offset {info.offset + 24}, got 6"
    )
    with pytest.raises(StorageError, match=expected):
        read_rows(checkpoint.store, info, 2, 4)
