"""The paged cache of keys and values, plain or in 8 bits with a scale for each token and head.

The cache of all layers is one array, layer l's page p at index l * num_pages + p, so that a layer's pages are reached
by an offset and never copied out (slicing a layer from a stacked cache costs a copy of it on TPU). Scales lie beside
it with their pages as the last two axes, which a TPU keeps without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from podquant.config.scheme import CacheDtype
from podquant.families.config import ModelConfig
from podquant.model.batch import Batch
from podquant.quantize.activations import quantize_per_token

_DTYPES = {"bfloat16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn"}

_QUANTIZED = ("int8", "float8_e4m3fn")


@dataclass(frozen=True)
class CacheLayout:
    """What the cache keeps of a token in a layer.

    Attributes:
        heads: key/value heads over all shards.
        key_dim, value_dim: numbers of each; without values (0) they are the front of the keys.
        dtype: of a number.
        axes: logical axes of keys and values.
        scale_axes: of their scales.
    """

    heads: int
    key_dim: int
    value_dim: int
    dtype: str
    axes: tuple[str, str, str, str]
    scale_axes: tuple[str, str, str]

    @property
    def is_quantized(self) -> bool:
        """Whether there are scales."""
        return self.dtype in _QUANTIZED


def cache_layout(config: ModelConfig, num_kv_heads: int, dtype: CacheDtype, computed: str) -> CacheLayout:
    """Latents are cached whole on every shard; keys and values of heads are shared out with the heads.

    Args:
        config: the model.
        num_kv_heads: over all shards.
        dtype: what is wanted.
        computed: what the model computes in.
    """
    kept = _DTYPES.get(dtype, computed)
    heads = "kv_heads" if config.latent is None else "one"
    axes, scale_axes = ("page", heads, "slot", "head_dim"), (heads, "page", "slot")
    if config.latent is not None:
        return CacheLayout(1, config.latent.cached_dim, 0, kept, axes, scale_axes)
    return CacheLayout(num_kv_heads, config.head_dim, config.head_dim, kept, axes, scale_axes)


class KVCache[A](NamedTuple):
    """Keys and values of all layers; arrays, or what is said of arrays.

    Attributes:
        keys, values: [layers * pages, K, page_size, H]; see `CacheLayout`.
        key_scales, value_scales: float32 [K, layers * pages, page_size], of codes in 8 bits; None: they are plain. What
            has no values of its own has no scales of them either.
    """

    keys: A
    values: A
    key_scales: A | None = None
    value_scales: A | None = None


type Cache = KVCache[jax.Array]


def write(cache: Cache, key: jax.Array, value: jax.Array | None, base: jax.Array, at: Batch) -> Cache:
    """Put the keys and values of a step's tokens into the pages of a layer.

    Args:
        cache: of all layers.
        key, value: [T, K, H]; no value where keys alone are cached.
        base: int32 scalar, the index of the layer's first page.
        at: where the tokens stand.
    """
    keys, key_scales = _put(cache.keys, cache.key_scales, key, base, at)
    if value is None:
        return cache._replace(keys=keys, key_scales=key_scales)
    values, value_scales = _put(cache.values, cache.value_scales, value, base, at)
    return KVCache(keys, values, key_scales, value_scales)


def _put(
    cache: jax.Array, scales: jax.Array | None, new: jax.Array, base: jax.Array, at: Batch
) -> tuple[jax.Array, jax.Array | None]:
    # By token and head: written over all heads at once the TPU compiler would keep them side by side, where attention
    # wants a head's tokens so, and would copy the whole cache between the two in every layer.
    pages, slots = (base + at.write_pages)[:, None], at.write_slots[:, None]
    heads = jnp.arange(cache.shape[1], dtype=jnp.int32)[None, :]
    if scales is None:
        return cache.at[pages, heads, slots].set(new.astype(cache.dtype)), None
    codes, scale = quantize_per_token(new, str(cache.dtype))
    return cache.at[pages, heads, slots].set(codes), scales.at[heads, pages, slots].set(scale[..., 0])


def gather(cache: jax.Array, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The pages `index` [B, n] of a cache, one behind the other: [B, K, n * page_size, H]."""
    taken = cache[index].astype(dtype).transpose(0, 2, 1, 3, 4)  # [B, K, n, page_size, H]
    return taken.reshape(*taken.shape[:2], -1, taken.shape[-1])


def gather_scales(scales: jax.Array, index: jax.Array) -> jax.Array:
    """Those of the pages `index` [B, n]: float32 [B, K, 1, n * page_size]."""
    heads = jnp.arange(scales.shape[0], dtype=jnp.int32)[None, :, None]  # one by one, as they are written
    taken = scales[heads, index[:, None, :]]  # [B, K, n, page_size]
    return taken.reshape(*taken.shape[:2], 1, -1)
