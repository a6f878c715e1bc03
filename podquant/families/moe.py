"""The families with experts: Mixtral, Qwen2-MoE, Qwen3-MoE, GLM-4-MoE, DeepSeek-V2 and V3.

Keys and defaults are those of the configuration classes in Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from podquant.errors import CheckpointError
from podquant.families.config import MOST_EXPERTS, ConfigReader, ModelConfig, MoEConfig, read_rope
from podquant.families.deepseek import read_latent
from podquant.families.disk import DiskNames
from podquant.families.experts import count_key
from podquant.families.family import Family, Sliding, qwen_sliding, read_sliding
from podquant.foreign import shown


def _mixtral(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    """arXiv:2401.04088. Its experts are as wide as a dense model's MLP."""
    return _experts(reader, reader.count("num_experts_per_tok", 2), config.ffn_size, (True,) * config.num_layers)


def _qwen2_moe(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    """A shared expert behind a gate of its own; scores are not normalized unless the file says so."""
    return _experts(
        reader,
        reader.count("num_experts_per_tok", 4),
        reader.count("moe_intermediate_size"),
        _qwen_layers(reader, config.num_layers),
        shared_ffn_size=reader.count("shared_expert_intermediate_size"),
        shared_gate=True,
        normalize=reader.flag("norm_topk_prob", False),
    )


def _qwen3_moe(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    """arXiv:2505.09388. No shared expert."""
    return _experts(
        reader,
        reader.count("num_experts_per_tok", 8),
        reader.count("moe_intermediate_size"),
        _qwen_layers(reader, config.num_layers),
        normalize=reader.flag("norm_topk_prob", False),
    )


def _glm4_moe(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    """arXiv:2508.06471: routed as DeepSeek-V3 does."""
    return {**_deepseek_routing(reader, config), "qk_norm": reader.flag("use_qk_norm", False)}


def _deepseek_routing(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    """DeepSeek-V3 (arXiv:2412.19437): sigmoid scores, a bias that balances, groups by their best two; shared experts.

    Layers beyond `num_hidden_layers`, which predict further tokens, are not run.
    """
    width = reader.count("moe_intermediate_size")
    dense = reader.count("first_k_dense_replace", 0, least=0)
    reader.refuse_unless("moe_layer_freq", [1])
    reader.refuse_unless("scoring_func", ["sigmoid"])
    reader.refuse_unless("topk_method", ["noaux_tc"])
    return _experts(
        reader,
        reader.count("num_experts_per_tok", 8),
        width,
        tuple(layer >= dense for layer in range(config.num_layers)),
        shared_ffn_size=width * reader.count("n_shared_experts", 1, least=0),
        scoring="sigmoid",
        normalize=reader.flag("norm_topk_prob", True),
        scaling=reader.number("routed_scaling_factor", 1.0),
        num_groups=reader.count("n_group", 1),
        top_groups=reader.count("topk_group", 1),
        group_score="top2",
        correction_bias=True,
    )


def _deepseek_v3(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    return {**_deepseek_routing(reader, config), "latent": read_latent(reader, config.rope)}


def _deepseek_v2(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    """arXiv:2405.04434: softmax scores as they are, of the best experts, or of the best in the best groups."""
    width = reader.count("moe_intermediate_size")
    dense = reader.count("first_k_dense_replace", 0, least=0)
    reader.refuse_unless("moe_layer_freq", [1])
    reader.refuse_unless("scoring_func", ["softmax"])
    reader.refuse_unless("topk_method", ["greedy", "group_limited_greedy"])
    reader.refuse_unless("norm_topk_prob", [False])
    grouped = reader.values.get("topk_method") == "group_limited_greedy"
    experts = _experts(
        reader,
        reader.count("num_experts_per_tok"),
        width,
        tuple(layer >= dense for layer in range(config.num_layers)),
        shared_ffn_size=width * reader.count("n_shared_experts", 2, least=0),
        normalize=False,
        scaling=reader.number("routed_scaling_factor", 1.0),
        num_groups=reader.count("n_group") if grouped else 1,
        top_groups=reader.count("topk_group") if grouped else 1,
    )
    return {**experts, "latent": read_latent(reader, config.rope)}


def _qwen_layers(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    step = reader.count("decoder_sparse_step", 1)
    dense = reader.values.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise CheckpointError(
            f"{reader.where}: `mlp_only_layers` must be a list of layers, got {shown(dense)}; is the file complete?"
        )
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def _experts(
    reader: ConfigReader, top_k: int, ffn_size: int, layers: tuple[bool, ...], **more: Any
) -> Mapping[str, Any]:
    """`moe`, with the number of experts, under whichever key it is; refuses what no token could be routed by."""
    key = count_key(reader.values)
    experts = reader.count(key, most=MOST_EXPERTS)
    moe = MoEConfig(experts, top_k, ffn_size, layers, **more)
    groups = moe.num_groups
    if experts % groups or moe.top_groups > groups or top_k > experts // groups * moe.top_groups:
        raise CheckpointError(
            f"{reader.where}: a token cannot choose {top_k} of `{key}: {experts}` experts in {moe.top_groups} of "
            f"{groups} groups: expected groups of equal size that hold as many; is the file complete?"
        )
    if moe.group_score == "top2" and groups > 1 and experts // groups < 2:
        raise CheckpointError(
            f"{reader.where}: groups are chosen by their best two experts, but {experts} experts in {groups} groups "
            "have one each; is the file complete?"
        )
    return {"moe": moe}


_LATENT: Mapping[str, Any] = {"spelled": {"head_dim": "qk_rope_head_dim"}, "defaults": {"head_dim": 64}}

MOE: Mapping[str, Family] = {
    "MixtralForCausalLM": Family(
        experts=True,
        qkv_bias=False,
        o_bias=False,
        sliding=read_sliding,
        names=DiskNames(renames={"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
        more=_mixtral,
    ),
    "Qwen2MoeForCausalLM": Family(
        experts=True,
        qkv_bias=True,
        o_bias=False,
        sliding=qwen_sliding,
        names=DiskNames(renames={"shared_experts": "shared_expert"}),
        more=_qwen2_moe,
    ),
    "Qwen3MoeForCausalLM": Family(
        experts=True,
        qk_norm=True,
        sliding=lambda reader: Sliding(qwen_sliding(reader).window),  # all layers slide, or none
        more=_qwen3_moe,
    ),
    "Glm4MoeForCausalLM": Family(
        experts=True, o_bias=False, rope=lambda reader: read_rope(reader, partial=0.5), more=_glm4_moe
    ),
    "DeepseekV2ForCausalLM": Family(experts=True, **_LATENT, more=_deepseek_v2),
    "DeepseekV3ForCausalLM": Family(experts=True, **_LATENT, more=_deepseek_v3),
}
