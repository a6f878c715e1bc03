"""A child process of test_weights_aot: compiles decode steps of 16 layers of a model's shape with the TPU compiler.

`python weights_aot_child.py TOPOLOGY NAME...` writes one JSON object to stdout: for each name in `MODELS` what `_facts`
says of it. No TPU is needed; libtpu can abort the process that loads it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from podquant.config.scheme import Scheme
from podquant.engine.compiler import compiler_options
from podquant.engine.hlo import Program
from podquant.engine.programs import Bucket, lower_step
from podquant.families.registry import read_model_config
from podquant.model.axes import TP
from podquant.model.layout import CacheShape, Model
from podquant.model.matmul import Numerics
from tests.engine.shapes import LLAMA_3_70B
from tests.engine.tpu_aot_child import NUM_TOP, PAGE_SIZE

QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
QWEN3_235B = QWEN3_32B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_key_value_heads": 4,
}
BLOCKS = Scheme("float8_e4m3fn", None, (128, 128))
MODELS: Mapping[str, tuple[Mapping[str, Any], Scheme | None]] = {
    "Llama-3-70B": (LLAMA_3_70B, None),
    "Qwen3-32B blocks": (QWEN3_32B, BLOCKS),
    "Qwen3-235B blocks": (QWEN3_235B, BLOCKS),
}
BATCH, CONTEXT, LAYERS = 32, 256, 16
"""A context of one chunk: attention's loop, whose rounds the program does not say, runs once."""


def _facts(config: Mapping[str, Any], scheme: Scheme | None, mesh: Mesh) -> dict[str, Any]:
    """Compile a step and say what the compiler made of it; bytes are of one chip, of weights without the embedding."""
    plain = ("embed_tokens", "lm_head", ".gate")
    device_kind = mesh.devices.flat[0].device_kind
    model = Model(
        read_model_config({**config, "num_hidden_layers": LAYERS}, ()),
        lambda module: None if module.endswith(plain) else scheme,
        Numerics("bfloat16", "tpu", device_kind),
        mesh,
        mesh.size if "num_experts" in config else 1,
    )
    shape = CacheShape(1 + BATCH * CONTEXT // PAGE_SIZE, PAGE_SIZE, BATCH, CONTEXT)
    options = dict(compiler_options(device_kind, "bfloat16"))
    compiled = lower_step(model, shape, Bucket(BATCH), NUM_TOP).compile(options)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    weights = sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(model.leaves, model.shardings, strict=True)
        if "embed_tokens" not in leaf.path
    )
    arrays = jax.tree.leaves(model.cache_arrays(shape))
    cache = sum(math.prod(each.sharding.shard_shape(each.shape)) * each.dtype.itemsize for each in arrays)
    return {
        "weight_bytes": weights,
        "cache_bytes": cache,
        "hbm_bytes": Program(text).hbm_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


def main(topology: str, *names: str) -> None:
    """Compile over all chips of a topology."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    mesh = Mesh(np.array(topologies.get_topology_desc(topology, "tpu").devices).reshape(-1), (TP,))
    json.dump({name: _facts(*MODELS[name], mesh) for name in names}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
