"""Gemma, Gemma 2 (arXiv:2408.00118) and the text model of Gemma 3 (arXiv:2503.19786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from podquant.families.config import FULL_ATTENTION, ConfigReader, ModelConfig, RopeConfig, read_rope
from podquant.families.disk import DiskNames
from podquant.families.family import Family, read_sliding

_DEFAULTS: Mapping[str, Any] = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_FOUR_NORMS = DiskNames(
    parts={
        "post_attention_layernorm": ("attention_output_norm",),
        "pre_feedforward_layernorm": ("post_attention_layernorm",),
        "post_feedforward_layernorm": ("mlp_output_norm",),
    }
)


def _gemma(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    reader.refuse_unless("use_bidirectional_attention", [False])
    # the first Gemma's files say `gelu`, and mean the approximation that it was trained with
    activation = "gelu_tanh" if config.activation == "gelu" else config.activation
    return {"norm_offset": 1.0, "embedding_scale": config.hidden_size**0.5, "activation": activation}


def _gemma2(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    reader.refuse_unless("use_bidirectional_attention", [False])
    return {
        "norm_offset": 1.0,
        "embedding_scale": config.hidden_size**0.5,
        "output_norms": True,
        "score_scale": reader.number("query_pre_attn_scalar", 256) ** -0.5,
        "score_cap": reader.optional("attn_logit_softcapping"),
        "logit_cap": reader.optional("final_logit_softcapping"),
    }


def _gemma3(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    local = _rope_of(reader, "sliding_attention", "rope_local_base_freq", 1e4)
    kinds = tuple(int(window != FULL_ATTENTION) for window in config.windows)
    return {**_gemma2(reader, config), "other_ropes": (local,), "layer_ropes": kinds}


def _rope_of(reader: ConfigReader, kind: str, theta: str, default: float) -> RopeConfig:
    """The rotation of a kind of layer: its own in the new spelling; in the old, `theta`, scaled in full layers only."""
    new = reader.values.get("rope_parameters")
    if isinstance(new, Mapping) and (kind in new or "rope_type" not in new):
        values: dict[str, Any] = {"rope_parameters": {"rope_theta": default, **(new.get(kind) or {})}}
    else:
        values = {"rope_theta": reader.number(theta, default)}
        if kind == "full_attention":
            values |= {key: reader.values[key] for key in ("rope_parameters", "rope_scaling") if key in reader.values}
    return read_rope(ConfigReader(values, reader.where))


GEMMA: Mapping[str, Family] = {
    "GemmaForCausalLM": Family(defaults=_DEFAULTS, more=_gemma),
    "Gemma2ForCausalLM": Family(
        spelled={"hidden_act": "hidden_activation"},
        defaults={**_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        sliding=lambda reader: read_sliding(reader, 4096, 2),
        names=_FOUR_NORMS,
        more=_gemma2,
    ),
    "Gemma3ForCausalLM": Family(
        spelled={"hidden_act": "hidden_activation"},
        defaults={**_DEFAULTS, "max_position_embeddings": 131072},
        qk_norm=True,
        sliding=lambda reader: read_sliding(reader, 4096, reader.count("sliding_window_pattern", 6)),
        rope=lambda reader: _rope_of(reader, "full_attention", "rope_theta", 1e6),
        names=_FOUR_NORMS,
        more=_gemma3,
    ),
}
