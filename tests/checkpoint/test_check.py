"""Headers against the model that config.json describes: what is missing, of another shape or type, or left over."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from podquant.checkpoint.check import check_headers
from podquant.checkpoint.index import Checkpoint
from podquant.dtypes import BY_NAME, DType
from podquant.errors import CheckpointError
from podquant.families.declaration import Declaration, declare
from podquant.families.registry import read_model_config

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
UP = "model.layers.1.mlp.up_proj"


@dataclass(frozen=True)
class Tensor:
    dtype: DType
    shape: tuple[int, ...]


Tensors = dict[str, Tensor]


def opened(name: str = "llama") -> tuple[Declaration, Tensors]:
    checkpoint = Checkpoint.open(str(GOLDENS / name))
    checkpoint.close()
    tensors = {tensor: Tensor(info.dtype, info.shape) for tensor, info in checkpoint.tensors.items()}
    return declare(read_model_config(json.loads(json.dumps(checkpoint.config)), tensors)), tensors


def test_what_no_weight_is_in_is_named() -> None:
    declaration, tensors = opened()
    assert check_headers(declaration, tensors, "here") == ()
    tensors |= {name: Tensor(BY_NAME["bool"], ()) for name in ("a.inv_freq", f"{UP}.bias", f"{UP}.weight_scale")}
    assert check_headers(declaration, tensors, "here") == ("a.inv_freq", f"{UP}.bias", f"{UP}.weight_scale")


def test_codes_are_as_good_as_floats_where_they_have_scales() -> None:
    declaration, tensors = opened()
    tensors[f"{UP}.weight"] = Tensor(BY_NAME["int8"], tensors[f"{UP}.weight"].shape)
    tensors[f"{UP}.weight_scale"] = Tensor(BY_NAME["float32"], (160, 1))
    assert check_headers(declaration, tensors, "here", lambda module: module == UP) == ()
    with pytest.raises(
        CheckpointError, match=rf"^here: tensor {UP}.weight: expected bfloat16, .*, got int8; config.json does not say"
    ):
        check_headers(declaration, tensors, "here")


def lose(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def reshape(name: str, shape: tuple[int, ...], dtype: str = "bfloat16") -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: Tensor(BY_NAME[dtype], shape)})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", lose(f"{UP}.weight"), r"up_proj.weight is missing: expected shape \[160, 64\] of a LlamaForCausalLM"),
        ("llama", lose("model.norm.weight", "lm_head.weight"), r"model.norm.weight is missing and 1 more"),
        ("llama", reshape(f"{UP}.weight", (159, 64)), r"shape \[160, 64\] from config.json, got \[159, 64\]. The"),
        ("llama", reshape(f"{UP}.weight", (160, 64, 1)), r"got \[160, 64, 1\]"),
        ("llama", reshape(f"{UP}.weight", (0, 64)), r"got \[0, 64\]"),
        ("llama", reshape("model.norm.weight", (64,), "int8"), "model.norm.weight: expected .*, float64, got int8"),
        ("qwen2", lose("model.layers.2.self_attn.k_proj.bias"), "layers.2.self_attn.k_proj.bias is missing"),
        ("qwen3_moe", lose("model.layers.0.mlp.experts.7.up_proj.weight"), "experts.7.up_proj.weight is missing"),
        ("deepseek_v3", lose("model.layers.1.mlp.gate.e_score_correction_bias"), "e_score_correction_bias is missing"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, change: Callable[[Tensors], object], message: str) -> None:
    declaration, tensors = opened(name)
    change(tensors)
    with pytest.raises(CheckpointError, match=f"^here: tensor .*{message}") as caught:
        check_headers(declaration, tensors, "here")
    assert "again" not in str(caught.value)  # the bytes are as they should be
