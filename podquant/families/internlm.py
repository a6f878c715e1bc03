"""InternLM 2 (arXiv:2403.17297) and 3, as `modeling_internlm2.py` and `modeling_internlm3.py` compute them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from podquant.families.config import ConfigReader, ModelConfig
from podquant.families.disk import DiskNames
from podquant.families.family import Family

_NAMES = DiskNames(
    embed_tokens="model.tok_embeddings",
    lm_head="output",
    parts={
        "attention_norm": ("input_layernorm",),
        "ffn_norm": ("post_attention_layernorm",),
        "attention.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.wo": ("self_attn.o_proj",),
        "feed_forward.w1": ("mlp.gate_proj",),
        "feed_forward.w2": ("mlp.down_proj",),
        "feed_forward.w3": ("mlp.up_proj",),
    },
    by_head=frozenset({"attention.wqkv"}),
)


def _internlm3(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    has_bias = reader.flag("bias", False)
    return {"qkv_bias": reader.flag("qkv_bias", False), "o_bias": has_bias, "mlp_bias": has_bias}


INTERNLM: Mapping[str, Family] = {
    "InternLM2ForCausalLM": Family(spelled={"attention_bias": "bias"}, defaults={"attention_bias": True}, names=_NAMES),
    "InternLM3ForCausalLM": Family(defaults={"max_position_embeddings": 32768}, more=_internlm3),
}
