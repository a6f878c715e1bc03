"""The sharding table: which dimension of which array lies along which axis of the mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

TP = "tp"
"""The mesh axis of tensor parallelism."""

RULES: Mapping[str, str | None] = {
    "layers": None,  # scanned over
    "vocab": TP,  # embedding rows, logits
    "heads": TP,  # query heads x head dim: q's output, o's input
    "kv_heads": TP,  # key/value heads (x head dim): k's and v's output, the KV cache
    "query_heads": TP,  # latent attention: query heads x (nope + rope), kv_b_proj's rows, o's input
    "key_value_heads": TP,
    "value_heads": TP,
    "ffn": TP,  # gate's and up's output, down's input
    "shared_ffn": TP,  # the same of a shared expert
    "shared_ffn_block": TP,
    "shards": TP,  # routed experts, laid out for each shard: see `moe`
    "local_expert": None,
    "local_ffn": None,
    "local_block": None,
    "experts": None,  # the router's outputs
    "embed": None,  # the residual stream
    "head_dim": None,
    "latent": None,  # what every shard computes and caches whole
    "q_rank": None,
    "kv_rank": None,
    "block": None,  # scale blocks along an unsharded input axis
    "q_rank_block": None,
    "kv_rank_block": None,
    "heads_block": TP,  # ... along a sharded one
    "value_heads_block": TP,
    "ffn_block": TP,
    "page": None,
    "slot": None,
    "one": None,
}


def spec_of(axes: Sequence[str]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions are these logical axes.

    Raises:
        ValueError: two dimensions would lie along one mesh axis.
        KeyError: an axis the table does not have.
    """
    mesh_axes = [RULES[axis] for axis in axes]
    used = [axis for axis in mesh_axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {tuple(axes)} put two dimensions along one mesh axis: {mesh_axes}")
    return PartitionSpec(*mesh_axes)
