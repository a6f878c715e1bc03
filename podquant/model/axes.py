"""The sharding table: which dimension of which array lies along which axis of the mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from podquant.families.declaration import AXES

TP = "tp"
"""The mesh axis of tensor parallelism."""

RULES: Mapping[str, str | None] = {
    **{axis: TP if is_cut else None for axis, is_cut in AXES.items()},
    "layers": None,  # scanned over
    "shards": TP,  # routed experts, laid out for each shard: see `moe`
    "local_expert": None,
    "local_ffn": None,
    "local_ffn_block": None,
    "block": None,  # scale blocks along an unsharded input axis
    "q_rank_block": None,
    "kv_rank_block": None,
    "heads_block": TP,  # ... along a sharded one
    "value_heads_block": TP,
    "ffn_block": TP,
    "shared_ffn_block": TP,
    "page": None,
    "slot": None,
}

LOCAL = frozenset({"local_ffn", "local_ffn_block"})
"""Axes that the layout of routed experts shares out, among the shards that have the same experts."""


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


def block_axis(axis: str, blocks: int) -> str:
    """The logical axis of scales, `blocks` of them along an axis."""
    return "one" if blocks == 1 else {"embed": "block"}.get(axis, f"{axis}_block")
