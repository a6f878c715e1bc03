"""Fused experts are there one by one, each where its bytes lie; what contradicts config.json is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from podquant.checkpoint.index import Checkpoint
from podquant.checkpoint.reader import read_tensor
from podquant.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint.fused import fused_copy
from tests.weights.quantized_checkpoints import Tensors, read_file, write_file

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v2", "deepseek_v3")
PREFIX = "model.layers.1.mlp.experts"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_has_its_name_and_its_bytes(tmp_path: Path, family: str) -> None:
    expected = read_file(GOLDENS / family / "model.safetensors")
    checkpoint = Checkpoint.open(str(fused_copy(GOLDENS / family, tmp_path / "model")))
    assert checkpoint.tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert checkpoint.tensors[name].name == name
        np.testing.assert_array_equal(read_tensor(checkpoint, name), array, err_msg=name)
    places = sorted((info.offset, info.nbytes) for info in checkpoint.tensors.values())
    ends = [offset + nbytes for offset, nbytes in places]
    assert [offset for offset, _ in places[1:]] == ends[:-1]  # each byte is in one tensor
    checkpoint.close()


def test_fused_experts_of_unknown_families_are_one_tensor(tmp_path: Path) -> None:
    place = fused_copy(GOLDENS / "qwen3_moe", tmp_path / "model")
    change_config(place, architectures=["Llama4ForCausalLM"])
    checkpoint = Checkpoint.open(str(place))
    assert checkpoint.tensors[f"{PREFIX}.gate_up_proj"].shape == (8, 96, 64)
    checkpoint.close()


def change_config(place: Path, **changes: Any) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, **changes}))


def lost(*suffixes: str) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.endswith(suffixes):
                del tensors[name]

    return change


def replaced(name: str, by: Callable[[Any], Any]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{PREFIX}.{name}": by(tensors[f"{PREFIX}.{name}"])})


def added(name: str, shape: tuple[int, ...]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{PREFIX}.{name}": np.zeros(shape, np.float32)})


def nothing(tensors: Tensors) -> None:
    pass


ONE_BY_ONE: list[tuple[Callable[[Tensors], Any], dict[str, Any], str]] = [
    (lost("experts.7.up_proj.weight"), {}, r"tensor model.layers.0.mlp.experts.7.up_proj.weight is missing: config.j"),
    (
        lost(*(f"experts.5.{name}_proj.weight" for name in ("gate", "up", "down"))),
        {},
        "5.gate_proj.weight is .* 2 more",
    ),
    (nothing, {"num_local_experts": 9}, r"experts.8.gate_proj.weight is missing and 2 more: .* num_local_experts: 9"),
    (
        nothing,
        {"num_local_experts": None, "num_experts": 6},
        "mlp.experts.7 is there, but config.* says num_experts: 6",
    ),
]
FUSED: list[tuple[Callable[[Tensors], Any], dict[str, Any], str]] = [
    (nothing, {"num_local_experts": 9}, r"gate_up_proj: expected shape \[9, 2F, 64\], as num_local.* \[8, 96, 64\]"),
    (replaced("down_proj", lambda a: a[:7]), {}, r"1.mlp.experts.down_proj: expected .*\[8, 64, F\].* \[7, 64, 48\]"),
    (replaced("gate_up_proj", lambda a: a.swapaxes(1, 2)), {}, r"expected shape \[8, 2F, 64\].* got \[8, 64, 96\]"),
    (replaced("gate_up_proj", lambda a: a[:, 1:]), {}, r"got \[8, 95, 64\]"),
    (replaced("gate_up_proj", lambda a: a[0]), {}, r"got \[96, 64\]"),
    (lost("1.mlp.experts.down_proj"), {}, "layers.1.mlp.experts.0.down_proj.weight is missing and 7 more"),
    (added("3.up_proj.weight", (48, 64)), {}, "3.up_proj.weight is stored twice: in model.safetensors, and in"),
]


@pytest.mark.parametrize(
    ("is_fused", "change", "config", "message"),
    [*((False, *each) for each in ONE_BY_ONE), *((True, *each) for each in FUSED)],
)
def test_experts_that_contradict_config_are_refused(
    tmp_path: Path, is_fused: bool, change: Callable[[Tensors], Any], config: dict[str, Any], message: str
) -> None:
    refuse(tmp_path, is_fused, change, config, CheckpointError, message)


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "down_proj_scale_inv"])
def test_other_forms_of_fused_experts_are_refused(tmp_path: Path, name: str) -> None:
    message = rf"{PREFIX}.{name} F32 \[8, 1, 1\]: of fused experts podquant reads only"
    refuse(tmp_path, True, added(name, (8, 1, 1)), {}, UnsupportedModelError, message)


def refuse(
    place: Path,
    is_fused: bool,
    change: Callable[[Tensors], Any],
    config: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    place = (fused_copy if is_fused else shutil.copytree)(GOLDENS / "qwen3_moe", place / "model")
    tensors = read_file(place / "model.safetensors")
    change(tensors)
    write_file(place / "model.safetensors", {name: np.ascontiguousarray(array) for name, array in tensors.items()})
    change_config(place, **config)
    with pytest.raises(error, match=message) as caught:
        Checkpoint.open(str(place))
    assert str(place) in str(caught.value)
