"""Dense families that are a Llama but for a detail: Phi-3, OLMo 2, Granite, SmolLM3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from podquant.errors import CheckpointError, UnsupportedModelError
from podquant.families.config import FULL_ATTENTION, NO_ROPE, ConfigReader, ModelConfig, RopeConfig, read_rope
from podquant.families.disk import DiskNames
from podquant.families.family import Family, Sliding, read_sliding
from podquant.foreign import shown

_FUSED = DiskNames(
    parts={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }
)
_NORMS_BEHIND = DiskNames(
    parts={
        "post_attention_layernorm": ("attention_output_norm",),
        "post_feedforward_layernorm": ("mlp_output_norm",),
    }
)


def _phi3_rope(reader: ConfigReader) -> RopeConfig:
    rope = read_rope(reader, partial=1.0)
    if rope.kind != "default":  # early files call longrope `yarn`
        raise UnsupportedModelError(
            f"{reader.where}: rope type {rope.kind!r} of a Phi-3 means longrope, which is not supported; use the "
            "checkpoint trained for the short context (`-4k-`)"
        )
    return rope


def _olmo2(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    return {"input_norms": False, "output_norms": True, "qk_norm_whole": True}


def _granite(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    return {
        "embedding_scale": reader.number("embedding_multiplier", 1.0),
        "residual_scale": reader.number("residual_multiplier", 1.0),
        "score_scale": reader.number("attention_multiplier", 1.0),
        "logit_scale": 1.0 / reader.number("logits_scaling", 1.0),
    }


def _smollm3(reader: ConfigReader, config: ModelConfig) -> Mapping[str, Any]:
    """Layers without rotation: listed, or every fourth."""
    every = reader.count("no_rope_layer_interval", 4)
    turns = reader.values.get("no_rope_layers")
    if turns is None:
        turns = [int((layer + 1) % every != 0) for layer in range(config.num_layers)]
    if not isinstance(turns, list) or len(turns) < config.num_layers or any(turn not in (0, 1) for turn in turns):
        raise CheckpointError(
            f"{reader.where}: `no_rope_layers` must have 1 for each of the {config.num_layers} layers that turns and 0 "
            f"for each that does not, got {shown(turns)}; is the checkpoint complete?"
        )
    kinds = tuple(1 - int(turn) for turn in turns[: config.num_layers])
    windows = config.windows
    if reader.values.get("layer_types") is None:  # then only layers without rotation slide
        windows = tuple(w if kind else FULL_ATTENTION for w, kind in zip(windows, kinds, strict=True))
    return {"other_ropes": (NO_ROPE,), "layer_ropes": kinds, "windows": windows}


DENSE: Mapping[str, Family] = {
    "Phi3ForCausalLM": Family(
        qkv_bias=False,
        o_bias=False,
        rope=_phi3_rope,
        sliding=read_sliding,
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        names=_FUSED,
    ),
    "Olmo2ForCausalLM": Family(qk_norm=True, defaults={"rms_norm_eps": 1e-5}, names=_NORMS_BEHIND, more=_olmo2),
    "GraniteForCausalLM": Family(more=_granite),
    "SmolLM3ForCausalLM": Family(
        sliding=lambda reader: read_sliding(reader) if reader.flag("use_sliding_window", False) else Sliding(),
        defaults={
            "rope_theta": 2e6,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        more=_smollm3,
    ),
}
