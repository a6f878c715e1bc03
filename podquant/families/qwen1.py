"""First-generation Qwen (arXiv:2309.16609), as `modeling_qwen.py` beside Qwen-7B-Chat computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from podquant.families.config import ConfigReader, ModelConfig, RopeConfig
from podquant.families.disk import DiskNames
from podquant.families.family import Family

_NAMES = DiskNames(
    layers="transformer.h",
    embed_tokens="transformer.wte",
    norm="transformer.ln_f",
    parts={
        "ln_1": ("input_layernorm",),
        "ln_2": ("post_attention_layernorm",),
        "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.c_proj": ("self_attn.o_proj",),
        "mlp.w1": ("mlp.up_proj",),
        "mlp.w2": ("mlp.gate_proj",),
        "mlp.c_proj": ("mlp.down_proj",),
    },
)


def _rope(reader: ConfigReader) -> RopeConfig:
    reader.refuse_unless("rotary_pct", [1.0])
    theta = reader.number("rotary_emb_base", 10000.0)
    if not reader.flag("use_dynamic_ntk", True):
        return RopeConfig("default", theta, {})
    return RopeConfig("dynamic_ntk", theta, {"original_max_position_embeddings": reader.count("seq_length", 8192)})


def _more(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    reader.refuse_unless("scale_attn_weights", [True])
    has_bias = not reader.flag("no_bias", True)
    return {
        "ffn_size": reader.count("intermediate_size", least=2) // 2,
        "o_bias": has_bias,
        "mlp_bias": has_bias,
        "logn_length": reader.count("seq_length", 8192, least=2) if reader.flag("use_logn_attn", True) else None,
    }


QWEN1: Mapping[str, Family] = {
    "QWenLMHeadModel": Family(
        qkv_bias=True,
        rope=_rope,
        spelled={"rms_norm_eps": "layer_norm_epsilon", "head_dim": "kv_channels"},
        defaults={"max_position_embeddings": 32768, "head_dim": 128},
        names=_NAMES,
        more=_more,
    )
}
