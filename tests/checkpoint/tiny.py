"""A whole tiny Llama on disk, as its config.json declares it, to convert and to damage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from podquant.families.declaration import declare
from podquant.families.registry import read_model_config

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float16",
}


def tiny_tensors(config: Mapping[str, Any], dtype: Any = np.float16) -> dict[str, np.ndarray[Any, Any]]:
    """Random weights, all that the model needs and no more."""
    random = np.random.default_rng(0)
    shapes = {
        name: tensor.shape for name, tensor in declare(read_model_config(config, ["lm_head.weight"])).tensors.items()
    }
    return {name: random.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}


def write_tiny(
    place: Path,
    tensors: Mapping[str, np.ndarray[Any, Any] | None] | None = None,
    **config: Any,
) -> Path:
    """Writes the Llama with tensors added, replaced or (None) left out, and keys of config.json changed or left out."""
    whole: dict[str, Any] = {**tiny_tensors(CONFIG), **(tensors or {})}
    place.mkdir(parents=True)
    save_file({name: each for name, each in whole.items() if each is not None}, place / "model.safetensors")
    changed = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (place / "config.json").write_text(json.dumps(changed))
    return place
