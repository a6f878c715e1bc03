"""Codes and scales as they are on disk, in the types that devices hold them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from podquant.errors import CheckpointError
from podquant.families.registry import read_model_config
from podquant.model.layout import Model
from podquant.model.matmul import Numerics
from podquant.model.mesh import make_mesh
from podquant.weights.load import load_weights
from podquant.weights.reading import as_dtype
from podquant.weights.source import open_source
from tests.weights.quantized_checkpoints import compressed, group, read_file, rows, write_file, write_pair

LLAMA = Path(__file__).parents[1] / "data" / "goldens" / "llama"
Array = np.ndarray[Any, np.dtype[Any]]


def test_rebiased_codes_are_a_sixteenth_of_the_value() -> None:
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    rebiased = as_dtype(codes, np.dtype(ml_dtypes.float8_e4m3b11fnuz))
    np.testing.assert_array_equal(rebiased.astype(np.float32) * 16, codes.astype(np.float32))  # NaN is NaN
    moved = {code: bits for code, bits in enumerate(rebiased.view(np.uint8).tolist()) if code != bits}
    assert moved == {0x7F: 0x80, 0xFF: 0x80, 0x80: 0x00}  # the two NaN, and -0


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_pair(LLAMA, tmp_path, compressed("float-quantized", group_0=group("float")), rows("float"))[0]


def load(checkpoint: Path, device_kind: str) -> dict[tuple[str | int, ...], Array]:
    source = open_source(str(checkpoint))
    config, numerics = read_model_config(source.config, source.tensors), Numerics("float32", "tpu", device_kind)
    model = Model(config, source.scheme_of, numerics, make_mesh("cpu", 2))
    try:
        weights = load_weights(model, source)
    finally:
        source.close()
    return {leaf.path: np.asarray(array) for leaf, array in zip(model.leaves, weights, strict=True)}


@pytest.mark.parametrize("device_kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite"])
def test_chips_without_e4m3fn_hold_the_same_weights_rebiased(checkpoint: Path, device_kind: str) -> None:
    plain, rebiased = load(checkpoint, "TPU7x"), load(checkpoint, device_kind)
    assert plain.keys() == rebiased.keys()
    for path, codes in plain.items():
        if path[-1] == "weight" and codes.dtype == ml_dtypes.float8_e4m3fn:
            assert rebiased[path].dtype == ml_dtypes.float8_e4m3b11fnuz
            scales = (*path[:-1], "weight_scale")
            expected = codes.astype(np.float32) * plain[scales]
            np.testing.assert_array_equal(rebiased[path].astype(np.float32) * rebiased[scales], expected)
        elif path[-1] != "weight_scale":
            assert codes.tobytes() == rebiased[path].tobytes()
    assert plain["segments", 0, "layers", "mlp", "up_proj", "weight"].dtype == ml_dtypes.float8_e4m3fn


def test_a_scale_that_a_device_could_not_hold_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = read_file(file)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tensors[name] = np.full_like(tensors[name], 3e37)
    write_file(file, tensors)
    message = r"layers\.1\.mlp\.up_proj\.weight_scale: expected scales below 2\.13e\+37, got 3e\+37"
    with pytest.raises(CheckpointError, match=message):
        load(checkpoint, "TPU v6 lite")
    load(checkpoint, "TPU7x")
