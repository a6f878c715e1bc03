"""The programs that put a window into the weights, moving rows between devices where they have to.

Each donates the weights it fills, so that the devices hold them and a window. Rows read for a device that needs just
them take no collective; columns of rows, or of experts, read by all take one all-to-all; rows that several devices hold
take one all-gather.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from podquant.model.axes import TP
from podquant.model.layout import Model
from podquant.weights.windows import Spread, Window

_BY_DEVICE = PartitionSpec(TP)


def place(model: Model, index: int, weights: jax.Array, window: Window, blocks: list[jax.Array]) -> jax.Array:
    """Put a window into a leaf; every process calls this, in the same order.

    Args:
        model: laid out over its mesh.
        index: of the leaf.
        weights: the leaf so far; donated.
        window: says where.
        blocks: what was read for the devices of this process, on them, in the order of the mesh.
    """
    shape = (model.mesh.size * blocks[0].shape[0], *blocks[0].shape[1:])
    joined = jax.make_array_from_single_device_arrays(shape, NamedSharding(model.mesh, _BY_DEVICE), blocks)
    at = np.array([window.stream.layer, window.slot, window.number, window.owner], np.int32)
    placed: jax.Array = placing(model, index, window)(weights, joined, at)
    return placed


def placing(model: Model, index: int, window: Window) -> Callable[..., Any]:
    """The compiled-on-demand program of a window: (leaf, blocks joined along axis 0, int32 [4]) to the leaf.

    The four numbers are layer, expert in the group, number of the rows and owner. Windows alike share one.
    """
    leaf, stream = model.leaves[index], window.stream
    how = _How(stream.spread, leaf.cut, leaf.copies, stream.group, window.stride, window.num_rows, window.num_experts)
    return _placing(model.mesh, model.shardings[index].spec, how)


class _How(NamedTuple):
    """What the programs of windows differ in, but for shapes; fields as in `Window`, `Stream` and `Leaf`."""

    spread: Spread
    cut: int | None
    copies: int
    group: int
    stride: int
    num_rows: int
    num_experts: int


@cache
def _placing(mesh: Mesh, spec: PartitionSpec, how: _How) -> Callable[..., Any]:
    mapped = jax.shard_map(
        partial(_place, how), mesh=mesh, in_specs=(spec, _BY_DEVICE, PartitionSpec()), out_specs=spec, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=0)


def _place(how: _How, weights: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
    """On one shard: weights [layers, rows, ...], or [layers, 1, experts, rows, columns]; block [experts, rows, ...]."""
    # The compiler must see that the first row is a multiple of the tile's rows: where it does not, it copies all of an
    # 8-bit leaf to write some of it (1.2 GB for a Llama-3-70B's gate_proj over 16 v6e, libtpu 0.0.50).
    layer, slot, row, owner = at[0], at[1], at[2] * how.stride, at[3]
    if weights.ndim - block.ndim == 2:
        return _update(weights, _experts(how, block), layer, slot, row)
    rows = block.reshape(block.shape[1:])
    if how.spread is Spread.SPLIT and how.cut == 1:
        rows = jax.lax.all_to_all(rows, TP, split_axis=1, concat_axis=0, tiled=True)[: how.num_rows]
    elif how.spread is Spread.SPLIT:
        rows = jax.lax.all_gather(rows, TP, tiled=True)[: how.num_rows]
    elif how.spread is Spread.ONE:
        rows = jax.lax.dynamic_index_in_dim(jax.lax.all_gather(rows, TP), owner, keepdims=False)
        if how.cut == 1:
            width = rows.shape[1] // jax.lax.axis_size(TP)
            rows = jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(TP) * width, width, axis=1)
    if how.cut == 0 and how.spread in (Spread.SPLIT, Spread.ONE):
        return _place_own(weights, rows, layer, row, how.copies)
    return _update(weights, rows, layer, row)


def _experts(how: _How, block: jax.Array) -> jax.Array:
    """A shard's rows or columns of experts that the shards of its group have read, whole or its own already."""
    if how.spread is Spread.EXPERTS and how.group > 1:
        groups = np.arange(jax.lax.axis_size(TP)).reshape(-1, how.group).tolist()
        if how.cut is None:
            block = jax.lax.all_gather(block, TP, axis_index_groups=groups, tiled=True)
        else:
            axis = 1 + how.cut
            block = jax.lax.all_to_all(block, TP, axis, 0, axis_index_groups=groups, tiled=True)
    return block[: how.num_experts]


def _place_own(weights: jax.Array, rows: jax.Array, layer: jax.Array, row: jax.Array, copies: int) -> jax.Array:
    """Rows of which this shard has some, or none: those from `row` on of a tensor cut in `copies` alike."""
    count = weights.shape[weights.ndim - rows.ndim]
    first = jax.lax.axis_index(TP) // copies * count - row
    padding = ((count, count), *((0, 0),) * (rows.ndim - 1))
    part = jax.lax.dynamic_slice_in_dim(jnp.pad(rows, padding), first + count, count)
    index = first + jnp.arange(count, dtype=jnp.int32)
    mine = ((index >= 0) & (index < len(rows))).reshape(-1, *(1,) * (rows.ndim - 1))
    top = jnp.int32(0)
    stacked = (1,) * (weights.ndim - rows.ndim)
    there = jax.lax.dynamic_slice(weights, _start(weights, rows, layer, top), (*stacked, *part.shape))
    return _update(weights, jnp.where(mine, part, there.reshape(part.shape)), layer, top)


def _update(weights: jax.Array, values: jax.Array, layer: jax.Array, *first: jax.Array) -> jax.Array:
    stacked = (1,) * (weights.ndim - values.ndim)
    start = _start(weights, values, layer, *first)
    return jax.lax.dynamic_update_slice(weights, values.reshape(*stacked, *values.shape), start)


def _start(weights: jax.Array, values: jax.Array, layer: jax.Array, *first: jax.Array) -> tuple[jax.Array, ...]:
    zero = jnp.int32(0)
    stacked = (layer, zero)[: weights.ndim - values.ndim]
    return (*stacked, *first, *(zero,) * (weights.ndim - len(stacked) - len(first)))
