"""Checkpoints of large models made from shapes alone: real headers, and a hole where the weights would be.

The files say that they hold a terabyte, and take the disk some megabytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[int, ...]]

_FILE_BYTES = 5 * 10**9  # as Hugging Face cuts them
_ITEM_BYTES = 2

LLAMA_405B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
"""Llama-3.1-405B."""

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
}
"""DeepSeek-V3 as a bf16 checkpoint, without the layer that predicts a second token."""


def llama_shapes(config: Mapping[str, Any]) -> Shapes:
    """Every tensor of a Llama, a layer after the other."""
    width, ffn = config["hidden_size"], config["intermediate_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.input_layernorm.weight": (width,), **_mlp(f"{prefix}.mlp", width, ffn)}
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (width,)
        for name, rows in (("q_proj", width), ("k_proj", keys), ("v_proj", keys), ("o_proj", width)):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (rows, width)
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}


def deepseek_shapes(config: Mapping[str, Any]) -> Shapes:
    """Every tensor of a DeepSeek-V3, a layer after the other."""
    width, ffn, expert = config["hidden_size"], config["intermediate_size"], config["moe_intermediate_size"]
    experts = config["n_routed_experts"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.input_layernorm.weight": (width,), **_mla(f"{prefix}.self_attn", config)}
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (width,)
        if layer < config["first_k_dense_replace"]:
            shapes |= _mlp(f"{prefix}.mlp", width, ffn)
            continue
        shapes[f"{prefix}.mlp.gate.weight"] = (experts, width)
        shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (experts,)
        for number in range(experts):
            shapes |= _mlp(f"{prefix}.mlp.experts.{number}", width, expert)
        shapes |= _mlp(f"{prefix}.mlp.shared_experts", width, config["n_shared_experts"] * expert)
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}


def _mlp(prefix: str, width: int, ffn: int) -> Shapes:
    rows = {"gate_proj": (ffn, width), "up_proj": (ffn, width), "down_proj": (width, ffn)}
    return {f"{prefix}.{name}.weight": shape for name, shape in rows.items()}


def _mla(prefix: str, config: Mapping[str, Any]) -> Shapes:
    width, heads, q_rank, kv_rank = (
        config[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    rows = {
        "q_a_proj": (q_rank, width),
        "q_a_layernorm": (q_rank,),
        "q_b_proj": (heads * (nope + rope), q_rank),
        "kv_a_proj_with_mqa": (kv_rank + rope, width),
        "kv_a_layernorm": (kv_rank,),
        "kv_b_proj": (heads * (nope + value), kv_rank),
        "o_proj": (width, heads * value),
    }
    return {f"{prefix}.{name}.weight": shape for name, shape in rows.items()}


def nbytes(shapes: Shapes) -> int:
    """Bytes of all weights."""
    return sum(map(_nbytes, shapes.values()))


def write_header_set(path: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """config.json, the index, and files of up to 5 GB as Hugging Face cuts them: headers, and holes for the data."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    parts = list(_files(shapes))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(part, file)
        header, end = {}, 0
        for name, shape in part.items():
            begin, end = end, end + _nbytes(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (path / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": nbytes(shapes)}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def _files(shapes: Shapes) -> Iterator[Shapes]:
    part: Shapes = {}
    filled = 0
    for name, shape in shapes.items():
        if part and filled + _nbytes(shape) > _FILE_BYTES:
            yield part
            part, filled = {}, 0
        part[name] = shape
        filled += _nbytes(shape)
    yield part


def _nbytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _ITEM_BYTES
