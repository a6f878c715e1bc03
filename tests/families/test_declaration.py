"""What is declared is what checkpoints hold, is what rules take it for, and is cut as the layers compute with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from podquant.checkpoint.index import Checkpoint
from podquant.families.declaration import Declaration, Rows, declare
from podquant.families.modules import kind_of
from podquant.families.registry import read_model_config

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))


def declared(name: str) -> Declaration:
    names = () if name == "gemma" else ["lm_head.weight"]
    return declare(read_model_config(json.loads((GOLDENS / name / "config.json").read_text()), names))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_holds_just_what_its_family_declares(name: str) -> None:
    checkpoint = Checkpoint.open(str(GOLDENS / name))
    declaration = declare(read_model_config(checkpoint.config, checkpoint.tensors))
    found = {tensor: info.shape for tensor, info in checkpoint.tensors.items()}
    assert {tensor: each.shape for tensor, each in declaration.tensors.items()} == found


@pytest.mark.parametrize("name", NAMES)
def test_kinds_are_those_that_names_tell(name: str) -> None:
    for tensor, each in declared(name).tensors.items():
        if tensor.endswith(".weight") and len(each.shape) == 2:
            assert each.kind == kind_of(each.module), tensor


def test_a_weight_knows_its_axes_and_its_place() -> None:
    weights = declared("llama").modules
    up, down = weights[1]["mlp.up_proj"]["weight"], weights[1]["mlp.down_proj"]["weight"]
    assert (up.axes, up.shape, up.cut) == (("ffn", "embed"), (160, 64), 0)
    assert (down.axes, down.shape, down.cut) == (("embed", "ffn"), (64, 160), 1)
    assert up.places == (Rows("model.layers.1.mlp.up_proj", (160, 64), 0, 160, 160),)
    assert weights[None]["norm"]["weight"].cut is None
    assert weights[None]["lm_head"]["weight"].kind == "lm_head"


def test_weights_that_share_a_tensor_have_rows_of_it() -> None:
    weights = declared("phi3").modules
    q, k, v = (weights[2][f"self_attn.{name}_proj"]["weight"].places for name in "qkv")
    module, shape = "model.layers.2.self_attn.qkv_proj", (128, 48)
    assert (q, k, v) == (
        (Rows(module, shape, 0, 64, 128),),
        (Rows(module, shape, 64, 32, 128),),
        (Rows(module, shape, 96, 32, 128),),
    )
    assert k[0].ranges(3, 9) == [(67, 73)]


def test_rows_that_take_turns() -> None:
    """Of 32 in each turn, 16 of q and 8 of k come first."""
    assert Rows("wqkv", (128, 64), 24, 8, 32).ranges(6, 18) == [(30, 32), (56, 64), (88, 90)]


def test_experts_are_one_weight_in_as_many_places() -> None:
    weights = declared("mixtral").modules
    down = weights[2]["mlp.experts.down_proj"]["weight"]
    assert [rows.module for rows in down.places] == [
        f"model.layers.2.block_sparse_moe.experts.{number}.w2" for number in range(8)
    ]
    assert (down.kind, down.axes, down.shape) == ("expert", ("embed", "expert_ffn"), down.places[7].shape)


@pytest.mark.parametrize(
    ("name", "tensor", "axis"),
    [
        ("llama", "model.embed_tokens.weight", 0),
        ("llama", "model.layers.0.self_attn.o_proj.weight", 1),
        ("llama", "model.norm.weight", None),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w2.weight", 1),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3.w1.weight", 0),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", None),
        ("qwen1", "transformer.h.0.mlp.w2.weight", 0),  # the gate of the first Qwens
        ("qwen1", "transformer.h.0.mlp.c_proj.weight", 1),
        ("qwen1", "transformer.h.0.attn.c_attn.bias", None),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate.weight", None),
        ("deepseek_v3", "model.layers.0.self_attn.q_a_proj.weight", 0),
        ("deepseek_v3", "model.layers.0.self_attn.kv_b_proj.weight", 0),
        ("deepseek_v3", "model.layers.0.self_attn.o_proj.weight", 1),
    ],
)
def test_where_slices_are_cut(name: str, tensor: str, axis: int | None) -> None:
    assert declared(name).tensors[tensor].cut == axis
