"""config.json, in its old and its new spelling, and everything that can be wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from podquant.errors import CheckpointError, UnsupportedModelError
from podquant.families.config import FULL_ATTENTION, ModelConfig, RopeConfig
from podquant.families.registry import FAMILIES, read_model_config

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
OLD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rope_theta": 500000.0,
    "torch_dtype": "float32",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}


def golden(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((GOLDENS / name / "config.json").read_text())
    return config


def read_with_head(config: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Of a checkpoint that stores a head."""
    return read_model_config(config, ["model.embed_tokens.weight", "lm_head.weight"], where)


def read(**changes: Any) -> ModelConfig:
    return read_with_head({**OLD, **changes})


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in OLD.items() if name != key}


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_old_and_new_spelling_read_the_same(key: str) -> None:
    old = read_with_head({**OLD, "rope_scaling": {key: "llama3", **LLAMA3}})
    new = {name: value for name, value in OLD.items() if name not in ("rope_theta", "torch_dtype")}
    parameters = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}
    assert read_with_head({**new, "dtype": "float32", "rope_parameters": parameters}) == old
    assert old.rope == RopeConfig("llama3", 500000.0, LLAMA3)
    assert old.dtype == "float32"


def test_what_is_left_out() -> None:
    config = read()
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (8, 8, 1e-6)
    assert (config.tied_embeddings, config.qkv_bias, config.o_bias, config.mlp_bias) == (False, False, False, False)
    assert config.activation == "silu"
    assert config.rope == RopeConfig("default", 500000.0, {})
    assert config.windows == (FULL_ATTENTION,) * 3
    assert (config.eos_token_ids, config.bos_token_id) == ((), None)
    assert read_with_head(without("rope_theta")).rope.theta == 10000.0
    assert read_with_head(without("torch_dtype")).dtype == "bfloat16"


def test_nulls_are_as_good_as_nothing() -> None:
    assert read(num_key_value_heads=None, head_dim=None, rope_scaling=None, tie_word_embeddings=None) == read()


def test_token_ids_are_one_or_several() -> None:
    config = read(eos_token_id=[2, 3], bos_token_id=1)
    assert (config.eos_token_ids, config.bos_token_id) == ((2, 3), 1)
    assert read(eos_token_id=2).eos_token_ids == (2,)


def test_a_scale_of_zero_is_none() -> None:
    rope = read(rope_scaling={"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0}).rope
    assert rope.parameters == {"factor": 4.0, "mscale": 1.0, "original_max_position_embeddings": 512}


def test_yarn_falls_back_to_the_context_it_has() -> None:
    rope = read(rope_scaling={"type": "yarn", "factor": 4.0, "truncate": False}).rope
    assert rope.parameters == {"factor": 4.0, "truncate": False, "original_max_position_embeddings": 512}


def test_each_family_differs_as_declared() -> None:
    moe = {"num_experts": 8, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 96}
    moe |= {"num_experts_per_tok": 2}
    configs = {name: read(architectures=[name], attention_bias=True, **moe) for name in FAMILIES}
    biases = {name: (config.qkv_bias, config.o_bias) for name, config in configs.items()}
    assert biases == {
        "LlamaForCausalLM": (True, True),
        "MistralForCausalLM": (False, False),
        "Qwen2ForCausalLM": (True, False),
        "Qwen3ForCausalLM": (True, True),
        "Phi3ForCausalLM": (False, False),
        "Olmo2ForCausalLM": (True, True),
        "GraniteForCausalLM": (True, True),
        "SmolLM3ForCausalLM": (True, True),
        "GemmaForCausalLM": (True, True),
        "Gemma2ForCausalLM": (True, True),
        "Gemma3ForCausalLM": (True, True),
        "MixtralForCausalLM": (False, False),
        "Qwen2MoeForCausalLM": (True, False),
        "Qwen3MoeForCausalLM": (True, True),
        "Glm4MoeForCausalLM": (True, False),
        "DeepseekV2ForCausalLM": (True, True),
        "DeepseekV3ForCausalLM": (True, True),
        "QWenLMHeadModel": (True, False),
        "InternLM2ForCausalLM": (True, True),
        "InternLM3ForCausalLM": (False, False),
    }
    assert [name for name, config in configs.items() if config.qk_norm] == [
        "Qwen3ForCausalLM",
        "Olmo2ForCausalLM",
        "Gemma3ForCausalLM",
        "Qwen3MoeForCausalLM",
    ]
    assert read(architectures=["Glm4MoeForCausalLM"], use_qk_norm=True, **moe).qk_norm


def test_the_goldens() -> None:
    assert read_with_head(golden("mistral-window")).windows == (8, 8, 8)
    assert read_with_head(golden("llama3-rope")).rope.kind == "llama3"
    assert read_with_head(golden("llama3-rope")).tied_embeddings
    assert read_with_head(golden("qwen2")).qkv_bias
    assert read_with_head(golden("qwen3")).head_dim == 16
    assert read_with_head(golden("llama")).eos_token_ids == (2,)


def test_gemma_3_in_its_old_spelling() -> None:
    gemma3 = {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 6, "sliding_window": 16}
    old = {**without("rope_theta"), **gemma3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = read_with_head(old)
    assert config.windows == (16,) * 5 + (FULL_ATTENTION,)
    assert config.layer_ropes == (1,) * 5 + (0,)
    assert config.rope == RopeConfig("linear", 1e6, {"factor": 8.0})
    assert config.other_ropes == (RopeConfig("default", 1e4, {}),)
    assert (config.head_dim, config.tied_embeddings, config.activation) == (256, True, "gelu_tanh")
    assert read_with_head({**old, "rope_local_base_freq": 2e4}).other_ropes[0].theta == 2e4
    assert read_with_head({**old, "sliding_window_pattern": 2}).layer_ropes == (1, 0) * 3
    new = {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 3e4}}
    config = read_with_head({**without("rope_theta"), **gemma3, "rope_parameters": new})
    assert (config.rope.theta, config.other_ropes[0].theta) == (5e5, 3e4)


def test_gemma_2_alternates_where_it_does_not_say() -> None:
    config = read(architectures=["Gemma2ForCausalLM"], sliding_window=16)
    assert config.windows == (16, FULL_ATTENTION, 16)
    assert (config.score_scale, config.score_cap, config.logit_cap) == (1 / 16, 50.0, 30.0)
    assert read(architectures=["Gemma2ForCausalLM"], hidden_act="silu").activation == "gelu_tanh"
    assert read(architectures=["GemmaForCausalLM"], hidden_act="gelu").activation == "gelu_tanh"


def test_first_generation_qwen() -> None:
    config = read_with_head(golden("qwen1"))
    assert (config.ffn_size, config.head_dim, config.norm_eps) == (160, 8, 1e-6)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (True, False, False)
    assert config.rope == RopeConfig("dynamic_ntk", 10000.0, {"original_max_position_embeddings": 512})
    assert config.logn_length == 512
    plain = read_with_head({**golden("qwen1"), "use_dynamic_ntk": False, "use_logn_attn": False})
    assert (plain.rope.kind, plain.logn_length) == ("default", None)
    with pytest.raises(CheckpointError, match="`layer_norm_epsilon` must be a positive number, got -1"):
        read_with_head({**golden("qwen1"), "layer_norm_epsilon": -1})


def test_internlm_says_by_other_names_where_biases_are() -> None:
    internlm2 = read(architectures=["InternLM2ForCausalLM"], bias=False)
    assert (internlm2.qkv_bias, internlm2.o_bias, internlm2.mlp_bias) == (False, False, False)
    internlm3 = read(architectures=["InternLM3ForCausalLM"], qkv_bias=True)
    assert (internlm3.qkv_bias, internlm3.o_bias, internlm3.mlp_bias) == (True, False, False)
    assert read(architectures=["InternLM3ForCausalLM"], bias=True).mlp_bias


def test_layers_without_rotation() -> None:
    smollm3 = {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 5, "num_key_value_heads": 8}
    assert read(**smollm3).layer_ropes == (0, 0, 0, 1, 0)
    assert read(**smollm3, no_rope_layer_interval=2).layer_ropes == (0, 1, 0, 1, 0)
    listed = read(**smollm3, no_rope_layers=[0, 1, 1, 0, 1], use_sliding_window=True, sliding_window=16)
    assert listed.layer_ropes == (1, 0, 0, 1, 0)
    assert listed.windows == (16, FULL_ATTENTION, FULL_ATTENTION, 16, FULL_ATTENTION)
    with pytest.raises(CheckpointError, match=r"`no_rope_layers` must have 1 for each of the 5 layers .* got \[1\]"):
        read(**smollm3, no_rope_layers=[1])


def test_a_part_of_each_head_turns() -> None:
    phi3: dict[str, Any] = {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.75}
    assert read(**phi3).rope.rotated == 0.75
    with pytest.raises(UnsupportedModelError, match="rope type 'yarn' of a Phi-3 means longrope"):
        read(**phi3, rope_scaling={"type": "yarn", "factor": 4.0})


def test_sliding_windows() -> None:
    def windows(**changes: Any) -> tuple[int, ...]:
        return read(**changes).windows

    mistral = {"architectures": ["MistralForCausalLM"]}
    assert windows(**mistral) == (4096,) * 3
    assert windows(**mistral, sliding_window=None) == (FULL_ATTENTION,) * 3
    qwen = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 16}
    assert windows(**qwen) == (FULL_ATTENTION,) * 3
    assert windows(**qwen, max_window_layers=1) == (FULL_ATTENTION, 16, 16)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(**qwen, layer_types=kinds) == (16, FULL_ATTENTION, 16)
    assert windows(**{**qwen, "use_sliding_window": False}, layer_types=kinds) == (FULL_ATTENTION,) * 3
    assert windows(**{**qwen, "sliding_window": None}) == (FULL_ATTENTION,) * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture 'GPT2LMHeadModel' is not supported; supported",
        ),
        ({"pretraining_tp": 2}, r"`pretraining_tp: 2` is not supported \(supported: \[1\] or absent\)"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported; supported are bfloat16"),
        ({"hidden_act": "relu"}, r"`hidden_act: 'relu'` is not supported"),
        (
            {"rope_scaling": {"type": "longrope"}},
            "rope type 'longrope' in `rope_scaling` is not supported",
        ),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope type 'proportional' in `rope_parameters`"),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` other than 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "`partial_rotary_factor` other than 1.0"),
        (
            {"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"]},
            r"`layer_types` must name .* each of the 3 layers, got \['full_attention'\]",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "layer_types": ["linear_attention"] * 3},
            "`layer_types` must name full_attention or sliding_attention",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^config.json: .*{message}"):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "`architectures` must be a list with the model's class name, got None"),
        ({"architectures": []}, r"`architectures` must be a list with the model's class name, got \[\]"),
        ({"architectures": [3]}, r"got \[3\]"),
        ({"hidden_size": "64"}, "`hidden_size` must be an integer from 1 on, got '64'"),
        ({"hidden_size": True}, "`hidden_size` must be an integer from 1 on, got True"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` must be an integer from 1 on, got 0"),
        ({"rms_norm_eps": -1}, "`rms_norm_eps` must be a positive number, got -1"),
        ({"rms_norm_eps": "1e-5"}, "`rms_norm_eps` must be a positive number, got '1e-5'"),
        ({"tie_word_embeddings": "yes"}, "`tie_word_embeddings` must be true or false, got 'yes'"),
        ({"eos_token_id": ["a"]}, r"`eos_token_id` must be a token id or a list of token ids, got \['a'\]"),
        ({"head_dim": 7}, "heads of 7 dimensions cannot be rotated in pairs"),
        ({"num_key_value_heads": 3}, "8 query heads are no multiple of 3 key/value heads"),
        ({"rope_scaling": "llama3"}, "`rope_scaling` must be a mapping, got 'llama3'"),
        ({"rope_parameters": 3}, "`rope_parameters` must be a mapping, got 3"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            "`rope_scaling` of type 'llama3' lacks low_freq_",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": "4"}},
            "rope_scaling: `factor` must be a positive number",
        ),
    ],
)
def test_what_is_malformed_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: .*{message}"):
        read(**changes)


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"],
)
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"^here: `{key}` must be an integer from 1 on, got nothing"):
        read_with_head(without(key), "here")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": "10000"},
        {"rope_parameters": {"rope_theta": "10000"}},
        {"rope_parameters": {"rope_theta": -1.0}},
        {"rope_scaling": {"type": "linear", "factor": 0}},
        {"rope_scaling": {"type": "linear", "factor": True}},
        {"rope_scaling": {"type": ["llama3"]}},
        {"architectures": ["MistralForCausalLM"], "sliding_window": "8"},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 0},
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": "x"},
        {"architectures": ["MistralForCausalLM"], "layer_types": 7},
        {"partial_rotary_factor": "half"},
        {"head_dim": 7},
        {"dtype": "int8"},
        {"max_position_embeddings": 0},
        {"bos_token_id": "<s>"},
        {"hidden_act": ["silu"]},
    ],
)
def test_no_value_gets_through_as_another_error(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^config.json: "):
        read(**changes)
