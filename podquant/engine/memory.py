"""What a model takes of each device's memory: its weights, its slots, and a token of the KV cache.

The engine sizes its cache by these figures, and a plan says them before any device is there. Of a `Model` alone, on a
mesh of devices or an abstract one; knows nothing of what a device has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import jax

from podquant.config.scheme import CacheDtype
from podquant.engine.slots import slot_arrays
from podquant.model.layout import CacheShape, Model

_ONE_TOKEN = CacheShape(num_pages=1, page_size=1, num_slots=1, context_length=1)


def device_bytes(arrays: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Bytes of a device's shards of these arrays."""
    return sum(math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in arrays)


def leaf_bytes(model: Model) -> tuple[int, ...]:
    """Of each leaf, the bytes that a device holds."""
    return tuple(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(model.leaves, model.shardings, strict=True)
    )


def slot_bytes(model: Model, num_slots: int) -> int:
    """Of a device, for so many sequences at a time."""
    return device_bytes(slot_arrays(model, CacheShape(1, 1, num_slots, 1)))


def token_bytes(model: Model, dtype: CacheDtype = "auto") -> int:
    """Bytes that a device keeps of a token: its keys and values in all layers, with their scales."""
    return device_bytes(jax.tree.leaves(model.cache_arrays(replace(_ONE_TOKEN, dtype=dtype))))


def cache_copies(model: Model) -> float:
    """How many devices keep the same part of a token's keys and values, on average: 1 where none is repeated."""
    kept, own = model.cache_layout("auto"), model.config.num_kv_heads
    heads = 1 if model.config.latent is not None else own
    needed: int = model.config.num_layers * heads * (kept.key_dim + kept.value_dim)
    held: int = sum(math.prod(array.sharding.shard_shape(array.shape)) for array in model.cache_arrays(_ONE_TOKEN)[:2])
    return held * model.layout.tp_size / needed
