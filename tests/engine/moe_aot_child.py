"""A child process of test_moe_aot: compiles a decode step of four layers of Qwen3-235B's shape with the TPU compiler.

Prints one JSON object: for each number of groups that the experts are shared out among, what the compiler made of it.
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from podquant.config.scheme import Scheme
from podquant.engine.programs import Bucket
from podquant.families.registry import read_model_config
from podquant.model.axes import TP
from podquant.model.layout import Model
from tests.engine.tpu_aot_child import BATCHES, NUMERICS, _facts

QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
BATCH = 32


def _int8(module: str) -> Scheme | None:
    return None if module.endswith(".gate") else Scheme("int8")


def main(topology: str, *ep_sizes: str) -> None:
    """Compile for each of `ep_sizes`, over all chips of a topology."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    config = read_model_config(QWEN3_235B, ())
    mesh = Mesh(np.array(topologies.get_topology_desc(topology, "tpu").devices).reshape(-1), (TP,))
    BATCHES[config.num_layers] = BATCH
    found = {}
    for ep_size in ep_sizes:
        model = Model(config, _int8, NUMERICS, mesh, int(ep_size))
        facts = _facts(model, BATCH, Bucket(BATCH))
        leaves = zip(model.leaves, model.shardings, strict=True)
        facts["expert_bytes"] = [
            int(np.prod(s.shard_shape(leaf.shape))) * leaf.dtype.itemsize
            for leaf, s in leaves
            if "experts" in leaf.path
        ]
        found[ep_size] = facts
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
