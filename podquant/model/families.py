"""The supported model families: each a short declaration of how it differs from a Llama.

The only place where an architecture's name decides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from podquant.config.architectures import refuse_unsupported
from podquant.dtypes import SOURCE_DTYPES
from podquant.errors import CheckpointError, UnsupportedModelError
from podquant.model.config import ConfigReader, ModelConfig, MoEConfig, RopeConfig, read_rope, read_windows
from podquant.model.deepseek import read_latent
from podquant.model.latent import LatentConfig
from podquant.model.moe_families import deepseek_routing, deepseek_v2, glm4_moe, mixtral, qwen2_moe, qwen3_moe


@dataclass(frozen=True)
class Family:
    """How one architecture differs.

    Attributes:
        qkv_bias: whether q, k and v carry a bias; None: config.json's `attention_bias` says so.
        o_bias: the same for the output projection.
        qk_norm: RMSNorm on each head of q and k; None: config.json's `use_qk_norm` says so.
        window: from config.json to (sliding window or None, first layer that slides).
        partial_rotary: the share of a head that is rotated if config.json does not say; None: always all of it.
        moe: from config.json and the number of layers to its experts.
        latent: from config.json to its latent attention.
    """

    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool | None = False
    window: Callable[[ConfigReader], tuple[int | None, int]] = lambda reader: (None, 0)
    partial_rotary: float | None = None
    moe: Callable[[ConfigReader, int], MoEConfig | None] = lambda reader, num_layers: None
    latent: Callable[[ConfigReader, RopeConfig], LatentConfig] | None = None


def _mistral_window(reader: ConfigReader) -> tuple[int | None, int]:
    # transformers' default when the key is absent is 4096; later Mistrals write null, and mean full attention.
    if reader.values.get("sliding_window", 4096) is None:
        return None, 0
    return reader.count("sliding_window", 4096), 0


def _qwen_window(reader: ConfigReader) -> tuple[int | None, int]:
    if not reader.flag("use_sliding_window", False) or reader.values.get("sliding_window", 4096) is None:
        return None, 0
    return reader.count("sliding_window", 4096), reader.count("max_window_layers", 28, least=0)


def _mixtral_window(reader: ConfigReader) -> tuple[int | None, int]:
    return (reader.count("sliding_window") if reader.values.get("sliding_window") is not None else None), 0


def _qwen_moe_window(reader: ConfigReader) -> tuple[int | None, int]:
    return (_qwen_window(reader)[0], 0)  # all layers slide, or none


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(qkv_bias=False, o_bias=False, window=_mistral_window),
    "Qwen2ForCausalLM": Family(qkv_bias=True, o_bias=False, window=_qwen_window),
    "Qwen3ForCausalLM": Family(qk_norm=True, window=_qwen_window),
    "MixtralForCausalLM": Family(qkv_bias=False, o_bias=False, window=_mixtral_window, moe=mixtral),
    "Qwen2MoeForCausalLM": Family(qkv_bias=True, o_bias=False, window=_qwen_window, moe=qwen2_moe),
    "Qwen3MoeForCausalLM": Family(qk_norm=True, window=_qwen_moe_window, moe=qwen3_moe),
    "Glm4MoeForCausalLM": Family(o_bias=False, qk_norm=None, partial_rotary=0.5, moe=glm4_moe),
    "DeepseekV2ForCausalLM": Family(moe=deepseek_v2, latent=read_latent),
    "DeepseekV3ForCausalLM": Family(moe=deepseek_routing, latent=read_latent),
}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def family_of(config: Mapping[str, Any], where: str = "config.json") -> tuple[str, Family]:
    """The architecture's name and family, or an `UnsupportedModelError` that lists what is supported."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{where}: `architectures` must be a list with the model's class name, got {names!r}")
    refuse_unsupported(config, where)
    return names[0], FAMILIES[names[0]]


def read_model_config(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Read a `config.json`.

    Args:
        config: the parsed file.
        where: its location, for messages.

    Raises:
        UnsupportedModelError: an architecture or option podquant cannot run.
        CheckpointError: a missing or malformed value.
    """
    architecture, family = family_of(config, where)
    reader = ConfigReader(config, where)
    reader.refuse_unless("pretraining_tp", [1])
    reader.refuse_unless("hidden_act", list(_ACTIVATIONS))
    num_layers = reader.count("num_hidden_layers")
    num_heads = reader.count("num_attention_heads")
    num_kv_heads = reader.count("num_key_value_heads", num_heads)
    hidden_size = reader.count("hidden_size")
    rope = read_rope(reader, family.partial_rotary)
    latent = family.latent(reader, rope) if family.latent else None
    head_dim = latent.rope_dim if latent else reader.count("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise CheckpointError(
            f"{where}: heads of {head_dim} dimensions cannot be rotated in pairs; expected an even number"
        )
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if dtype not in SOURCE_DTYPES:
        raise UnsupportedModelError(
            f"{where}: dtype {dtype!r} is not supported; supported are {', '.join(SOURCE_DTYPES)}"
        )
    if num_heads % num_kv_heads:
        raise CheckpointError(f"{where}: {num_heads} query heads are no multiple of {num_kv_heads} key/value heads")
    attention_bias = reader.flag("attention_bias", False)
    window, first_windowed = family.window(reader)
    return ModelConfig(
        architecture=architecture,
        vocab_size=reader.count("vocab_size"),
        hidden_size=hidden_size,
        ffn_size=reader.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=rope,
        windows=read_windows(reader, num_layers, window, first_windowed),
        tied_embeddings=reader.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=reader.flag("mlp_bias", False),
        qk_norm=reader.flag("use_qk_norm", False) if family.qk_norm is None else family.qk_norm,
        activation=_ACTIVATIONS[config.get("hidden_act") or "silu"],
        max_positions=reader.count("max_position_embeddings", 2048),
        dtype=dtype,
        eos_token_ids=reader.token_ids("eos_token_id"),
        bos_token_id=next(iter(reader.token_ids("bos_token_id")), None),
        moe=family.moe(reader, num_layers),
        latent=latent,
    )
