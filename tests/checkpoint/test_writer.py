from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.flax import load_file as load_flax
from safetensors.numpy import load_file

from podquant.checkpoint.index import Checkpoint
from podquant.checkpoint.reader import read_tensor
from podquant.checkpoint.writer import SafetensorsWriter
from podquant.dtypes import BY_NAME
from podquant.errors import CheckpointError
from podquant.storage.local.publication import LocalWriter

FILE = "model.safetensors"
RNG = np.random.default_rng(0)
TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "scale": RNG.normal(size=(7, 1)).astype(np.float32),
    "plain": RNG.normal(size=(7, 6)).astype(ml_dtypes.bfloat16),
    "codes": RNG.integers(-127, 128, (7, 6), np.int8),
    "scalar": np.array(3, np.int8),
    "empty": np.zeros((0, 2), np.int8),
}
FLOAT8 = RNG.normal(size=(5, 3)).astype(ml_dtypes.float8_e4m3fn)
DTYPES = {np.dtype(d.numpy): d for d in BY_NAME.values()}


def _start(folder: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> tuple[LocalWriter, SafetensorsWriter]:
    writer = LocalWriter(folder / FILE, FILE)
    return writer, SafetensorsWriter(writer, [(n, DTYPES[a.dtype], a.shape) for n, a in tensors.items()])


def _write(folder: Path, tensors: dict[str, np.ndarray[Any, Any]], window: int = 100) -> LocalWriter:
    writer, file = _start(folder, tensors)
    for name, array in tensors.items():
        if array.ndim == 0:
            file.append(name, array)
            continue
        for start in range(0, max(len(array), 1), window):
            file.append(name, array[start : start + window])
    file.close()
    return writer


def test_safetensors_reads_it(tmp_path: Path) -> None:
    writer = _write(tmp_path, TENSORS)
    loaded = load_file(tmp_path / FILE)
    assert loaded.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)
    with safe_open(tmp_path / FILE, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    raw = (tmp_path / FILE).read_bytes()
    assert (writer.nbytes, writer.crc32c) == (len(raw), google_crc32c.value(raw))


def test_the_flax_reader_reads_it(tmp_path: Path) -> None:
    _write(tmp_path, TENSORS)
    loaded = load_flax(tmp_path / FILE)
    for name, array in TENSORS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(loaded[name]), array)


def test_podquant_reads_it_float8_included(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = TENSORS | {"float8": FLOAT8}
    _write(tmp_path, tensors)
    checkpoint = Checkpoint.open(str(tmp_path))
    for name, array in tensors.items():
        np.testing.assert_array_equal(read_tensor(checkpoint, name), array)


def test_plain_struct_and_json_recover_float8(tmp_path: Path) -> None:
    _write(tmp_path, {"float8": FLOAT8})
    raw = (tmp_path / FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + length])["float8"]
    assert entry == {"dtype": "F8_E4M3", "shape": [5, 3], "data_offsets": [0, 15]}
    assert raw[8 + length :] == FLOAT8.tobytes()


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_the_bytes_do_not_depend_on_the_windows(tmp_path: Path, window: int) -> None:
    (tmp_path / "whole").mkdir()
    _write(tmp_path, TENSORS, window)
    _write(tmp_path / "whole", TENSORS)
    assert (tmp_path / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_rows_that_are_not_contiguous_are_written_in_order(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    _, file = _start(tmp_path, {"x": array.T.copy()})
    file.append("x", array.T)
    file.close()
    np.testing.assert_array_equal(load_file(tmp_path / FILE)["x"], array.T)


def test_a_file_of_no_tensors_is_complete(tmp_path: Path) -> None:
    _write(tmp_path, {})
    assert load_file(tmp_path / FILE) == {}


def test_another_order_is_refused(tmp_path: Path) -> None:
    _, file = _start(tmp_path, TENSORS)
    file.append("scale", TENSORS["scale"][:3])
    expected = f"{FILE}: got tensor 'plain', expected 'scale' (3 of its 7 elements written)."
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        file.append("plain", TENSORS["plain"])


@pytest.mark.parametrize(
    "rows", [np.zeros((2, 6), np.float32), np.zeros((2, 5), np.int8), np.zeros(6, np.int8), np.zeros((), np.int8)]
)
def test_rows_of_another_kind_are_refused(tmp_path: Path, rows: np.ndarray[Any, Any]) -> None:
    _, file = _start(tmp_path, {"codes": TENSORS["codes"]})
    expected = f"{FILE}: tensor 'codes': got {rows.dtype}{list(rows.shape)}, expected rows of int8[7, 6]."
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        file.append("codes", rows)


def test_too_many_rows_are_refused(tmp_path: Path) -> None:
    _, file = _start(tmp_path, {"codes": TENSORS["codes"]})
    file.append("codes", TENSORS["codes"][:5])
    expected = f"{FILE}: tensor 'codes': 18 more elements are too many (30 of its 42 elements written)."
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        file.append("codes", TENSORS["codes"][:3])


def test_a_tensor_after_the_last_is_refused(tmp_path: Path) -> None:
    _, file = _start(tmp_path, {"codes": TENSORS["codes"]})
    file.append("codes", TENSORS["codes"])
    with pytest.raises(CheckpointError, match=f"{FILE}: tensor 'codes' comes after the last one declared"):
        file.append("codes", TENSORS["codes"])


def test_closing_early_is_refused_and_the_file_stays_open(tmp_path: Path) -> None:
    writer, file = _start(tmp_path, TENSORS)
    file.append("scale", TENSORS["scale"])
    file.append("plain", TENSORS["plain"][:6])
    expected = f"{FILE}: closed before tensor 'plain' was complete (36 of its 42 elements written)."
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        file.close()
    assert not writer.is_closed
    writer.close()
