"""The supported model families: each a short declaration of how it differs from a Llama.

The only place where an architecture's name decides anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from podquant.dtypes import SOURCE_DTYPES
from podquant.errors import CheckpointError, UnsupportedModelError
from podquant.families.config import MOST_LAYERS, ConfigReader, ModelConfig, read_windows
from podquant.families.dense import DENSE
from podquant.families.experts import ExpertNames
from podquant.families.family import Family, qwen_sliding, read_sliding
from podquant.families.gemma import GEMMA
from podquant.families.internlm import INTERNLM
from podquant.families.modules import kind_of
from podquant.families.moe import MOE
from podquant.families.qwen1 import QWEN1
from podquant.foreign import shown

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    # transformers' default when the key is absent is 4096; later Mistrals write null, and mean full attention.
    "MistralForCausalLM": Family(qkv_bias=False, o_bias=False, sliding=lambda reader: read_sliding(reader, 4096)),
    "Qwen2ForCausalLM": Family(qkv_bias=True, o_bias=False, sliding=qwen_sliding),
    "Qwen3ForCausalLM": Family(qk_norm=True, sliding=qwen_sliding),
    **DENSE,
    **GEMMA,
    **INTERNLM,
    **MOE,
    **QWEN1,
}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family that config.json names, None if podquant does not know it."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return FAMILIES.get(name) if isinstance(name, str) else None


def _unsupported(name: str, where: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where}: architecture {shown(name)} is not supported; supported are {', '.join(FAMILIES)}"
    )


def expert_names(config: Mapping[str, Any]) -> ExpertNames | None:
    """What the routed experts of config.json's family are called on disk; None of a family that has none."""
    family = family_of(config)
    if family is None or not family.experts:
        return None
    places = [
        family.names.in_layer(0, f"mlp.experts.0.{name}").module for name in ("gate_proj", "up_proj", "down_proj")
    ]
    block = places[0].removeprefix(f"{family.names.layers}.0.").partition(".experts.")[0]
    return ExpertNames(block, *(place.rpartition(".")[2] for place in places))


def is_tied(config: Mapping[str, Any], names: Iterable[str], where: str = "config.json") -> bool:
    """Whether the embedding is the output projection too.

    `tie_word_embeddings` says so. Where it is absent or null, as transformers leaves it where it is what the model's
    class has by default: of a family that ties by default, it is; of others if the checkpoint stores no head.

    Args:
        config: config.json.
        names: of all tensors of the checkpoint.
        where: the file, for messages.

    Raises:
        CheckpointError: the key is neither true nor false.
    """
    family = family_of(config)
    default = family.defaults.get("tie_word_embeddings") if family else None
    if default is None:
        modules = {name.rpartition(".")[0] for name in names}
        head = family.names.lm_head if family else None
        default = not any(module == head or kind_of(module) == "lm_head" for module in modules)
    return ConfigReader(config, where).flag("tie_word_embeddings", default)


def read_model_config(config: Mapping[str, Any], names: Iterable[str], where: str = "config.json") -> ModelConfig:
    """Read a `config.json`.

    Args:
        config: the parsed file.
        names: of all tensors of the checkpoint, which decide what it leaves open, see `is_tied`.
        where: its location, for messages.

    Raises:
        UnsupportedModelError: an architecture or option podquant cannot run.
        CheckpointError: a missing or malformed value.
    """
    architectures, family = config.get("architectures"), family_of(config)
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise CheckpointError(
            f"{where}: `architectures` must be a list with the model's class name, got {shown(architectures)}"
        )
    if family is None:
        raise _unsupported(architectures[0], where)
    reader = ConfigReader(config, where, family.spelled, family.defaults)
    reader.refuse_unless("pretraining_tp", [1])
    reader.refuse_unless("hidden_act", list(_ACTIVATIONS))
    num_layers, hidden_size = reader.count("num_hidden_layers", most=MOST_LAYERS), reader.count("hidden_size")
    num_heads, num_kv_heads, head_dim = _read_heads(reader, hidden_size, where)
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if not isinstance(dtype, str) or dtype not in SOURCE_DTYPES:
        raise UnsupportedModelError(
            f"{where}: dtype {shown(dtype)} is not supported; supported are {', '.join(SOURCE_DTYPES)}"
        )
    attention_bias = reader.flag("attention_bias", False)
    common = ModelConfig(
        architecture=architectures[0],
        vocab_size=reader.count("vocab_size"),
        hidden_size=hidden_size,
        ffn_size=reader.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=family.rope(reader),
        windows=read_windows(reader, num_layers, *family.sliding(reader)),
        tied_embeddings=is_tied(config, names, where),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias if family.o_bias is None else family.o_bias,
        mlp_bias=reader.flag("mlp_bias", False),
        qk_norm=family.qk_norm,
        activation=_ACTIVATIONS[reader.values.get("hidden_act") or "silu"],
        max_positions=reader.count("max_position_embeddings", 2048),
        dtype=dtype,
        eos_token_ids=reader.token_ids("eos_token_id"),
        bos_token_id=next(iter(reader.token_ids("bos_token_id")), None),
        names=family.names,
    )
    return replace(common, **family.more(reader, common))


def _read_heads(reader: ConfigReader, hidden_size: int, where: str) -> tuple[int, int, int]:
    """Query heads, key/value heads, and dimensions of each."""
    num_heads = reader.count("num_attention_heads")
    num_kv_heads = reader.count("num_key_value_heads", num_heads)
    head_dim = reader.count("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise CheckpointError(
            f"{where}: heads of {head_dim} dimensions cannot be rotated in pairs; expected an even number"
        )
    if num_heads % num_kv_heads:
        raise CheckpointError(f"{where}: {num_heads} query heads are no multiple of {num_kv_heads} key/value heads")
    return num_heads, num_kv_heads, head_dim
