"""Grouped-query attention over a paged key/value cache, on one shard of a mesh.

The cache of all layers is one array, layer l's page p at index l * num_pages + p, so that a layer's pages are reached
by an offset and never copied out (slicing a layer from a stacked cache costs a copy of it on TPU). Attention walks the
pages in chunks with a running softmax (arXiv:2205.14135), as many as the longest sequence needs: one program for every
context length, and no more memory than a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from podquant.families.config import ModelConfig
from podquant.model.linear import Linear, RMSNorm, project
from podquant.model.matmul import Numerics
from podquant.model.parameter import Module
from podquant.model.rope import rotate

CHUNK_TOKENS = 256
"""Positions of the context that one round of the running softmax takes."""

_FLOOR = -1e38
"""The running maximum before any score: finite, so that a chunk a row sees nothing of gives exp(-inf) = 0, not NaN."""


@dataclass(frozen=True)
class CacheLayout:
    """What the cache keeps of a token in a layer.

    Attributes:
        heads: key/value heads over all shards.
        key_dim, value_dim: numbers of each; without values (0) they are the front of the keys.
        axes: logical axes of keys and values.
    """

    heads: int
    key_dim: int
    value_dim: int
    axes: tuple[str, str, str, str]


def cache_layout(config: ModelConfig, num_kv_heads: int) -> CacheLayout:
    """Latents are cached whole on every shard; keys and values of heads are shared out with the heads."""
    if config.latent is not None:
        return CacheLayout(1, config.latent.cached_dim, 0, ("page", "one", "slot", "head_dim"))
    return CacheLayout(num_kv_heads, config.head_dim, config.head_dim, ("page", "kv_heads", "slot", "head_dim"))


class KVCache(NamedTuple):
    """Keys and values of all layers, each [layers * pages, K, page_size, H] in the model's dtype; see `CacheLayout`."""

    keys: jax.Array
    values: jax.Array


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a step stand; the same for every layer.

    Attributes:
        positions: int32 [B, T], of each token in its sequence.
        page_table: int32 [B, W], the pages of each sequence in order; W * page_size is a multiple of CHUNK_TOKENS.
        write_pages, write_slots: int32 [B * T], where each token's key and value go; page 0 takes those of padding.
        pages_per_layer: pages each layer has.
        cos_sin: float32 [B, T, 1, H/2] each, the rotation at `positions`.
        other_cos_sin: those of layers that rotate otherwise.
        query_scale: float32 [B, T, 1, 1], on queries once they are rotated; None for none.
    """

    positions: jax.Array
    page_table: jax.Array
    write_pages: jax.Array
    write_slots: jax.Array
    pages_per_layer: int
    cos_sin: tuple[jax.Array, jax.Array]
    other_cos_sin: tuple[tuple[jax.Array, jax.Array], ...] = ()
    query_scale: jax.Array | None = None

    def of_layer(self, rope: jax.Array | None) -> Positions:
        """The same with the rotation of a layer: int32 scalar 0 for `cos_sin`, i for `other_cos_sin[i - 1]`."""
        if rope is None:
            return self
        pairs = zip(self.cos_sin, *self.other_cos_sin, strict=True)
        cos, sin = (jax.lax.dynamic_index_in_dim(jnp.stack(kinds), rope, keepdims=False) for kinds in pairs)
        return replace(self, cos_sin=(cos, sin))


class Attention(nnx.Module):
    """q, k, v and output projections around paged attention.

    Args:
        config: the model.
        modules: of the layer, by name. K on the devices may be repeated to the number of shards.
        numerics: what the model computes in.
    """

    def __init__(self, config: ModelConfig, modules: Mapping[str, Module], numerics: Numerics) -> None:
        self.head_dim = config.head_dim
        self.q_proj = Linear(modules["self_attn.q_proj"], numerics)
        self.k_proj = Linear(modules["self_attn.k_proj"], numerics)
        self.v_proj = Linear(modules["self_attn.v_proj"], numerics)
        self.o_proj = Linear(modules["self_attn.o_proj"], numerics)
        self.qk_norm_whole = config.qk_norm_whole  # over all heads together, not over each
        if config.qk_norm:
            self.q_norm = RMSNorm(modules["self_attn.q_norm"], config.norm_eps, numerics, config.norm_offset)
            self.k_norm = RMSNorm(modules["self_attn.k_norm"], config.norm_eps, numerics, config.norm_offset)
        self.score_scale, self.score_cap = config.score_scale, config.score_cap
        # XLA:CPU has fast float32 dots of any shape, and none in bf16 for a single row.
        self.score_dtype = "float32" if numerics.platform == "cpu" else numerics.dtype

    def __call__(
        self, x: jax.Array, cache: KVCache, layer: jax.Array, window: jax.Array, at: Positions
    ) -> tuple[jax.Array, KVCache]:
        """Attend.

        Args:
            x: [B * T, D].
            cache: of all layers; this step's keys and values are written into it.
            layer: int32 scalar, this layer's index.
            window: int32 scalar, positions attended over.
            at: where the tokens stand.

        Returns:
            [B * T, D] and the cache.
        """
        batch, length = at.positions.shape
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        if self.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(batch, length, -1, self.head_dim) for y in (q, k, v))
        if hasattr(self, "q_norm") and not self.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, at.cos_sin), rotate(k, at.cos_sin)
        if at.query_scale is not None:
            q = q * at.query_scale.astype(q.dtype)
        base = layer * at.pages_per_layer
        cache = KVCache(write(cache.keys, k, base, at), write(cache.values, v, base, at))
        y = attend(q.astype(self.score_dtype), cache, base, window, at, scale=self.score_scale, cap=self.score_cap)
        return self.o_proj(y.astype(x.dtype).reshape(batch * length, -1)), cache


def write(cache: jax.Array, new: jax.Array, base: jax.Array, at: Positions) -> jax.Array:
    """Put this step's keys or values [B, T, K, H] into the pages of the layer whose first is `base`."""
    rows = new.reshape(-1, *new.shape[2:]).astype(cache.dtype)
    return cache.at[base + at.write_pages, :, at.write_slots, :].set(rows)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap * tanh(x / cap)` (arXiv:2408.00118); None: `x`."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    q: jax.Array,
    cache: KVCache,
    base: jax.Array,
    window: jax.Array,
    at: Positions,
    *,
    scale: float | None = None,
    value_dim: int | None = None,
    cap: float | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v over each token's own and earlier positions within `window`.

    Args:
        q: [B, T, N, H], rotated.
        cache: keys and values, this step's included.
        base: int32 scalar, index of this layer's first page.
        window: int32 scalar.
        at: where the tokens stand.
        scale, cap: of the scores, which are capped once scaled, see `soft_cap`; scale None: 1 / sqrt(H).
        value_dim: a value is the first so many numbers of its key; None: it is in the cache of values.

    Returns:
        [B, T, N, H or value_dim] float32.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads, page_size = cache.keys.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    width = cache.values.shape[3] if value_dim is None else value_dim
    pages = max(1, min(CHUNK_TOKENS // page_size, at.page_table.shape[1]))
    chunk = pages * page_size
    rows = _by_kv_head(q, kv_heads)
    row_positions = jnp.tile(at.positions, (1, heads // kv_heads))[:, None, :, None]

    def body(step: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        best, total, acc = carry
        index = base + jax.lax.dynamic_slice_in_dim(at.page_table, step * pages, pages, axis=1)
        keys = _gather(cache.keys, index, q.dtype)
        values = _gather(cache.values, index, q.dtype) if value_dim is None else keys[..., :value_dim]
        scores = soft_cap(_product("bkrh,bksh->bkrs", rows, keys) * scale, cap)
        positions = (step * chunk + jnp.arange(chunk, dtype=jnp.int32)).reshape(1, 1, 1, chunk)
        seen = (positions <= row_positions) & (positions > row_positions - window)
        scores = jnp.where(seen, scores, -jnp.inf)
        new_best = jnp.maximum(best, scores.max(axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - new_best), jnp.exp(best - new_best)
        part = _product("bkrs,bksh->bkrh", weights.astype(q.dtype), values)
        return new_best, total * shrink + weights.sum(axis=-1, keepdims=True), acc * shrink + part

    shape = rows.shape[:3]
    start = (
        jnp.full((*shape, 1), _FLOOR, jnp.float32),
        jnp.zeros((*shape, 1), jnp.float32),
        jnp.zeros((*shape, width), jnp.float32),
    )
    first = jnp.maximum(at.positions[:, 0].min() - window + 1, 0) // chunk
    last = at.positions.max() // chunk + 1
    _, total, acc = jax.lax.fori_loop(first, last, body, start)
    y = (acc / total).reshape(batch, kv_heads, -1, length, width)
    result: jax.Array = y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)
    return result


def _by_kv_head(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] to [B, K, G * T, H]: the query heads that share a key/value head become rows of one product."""
    batch, length, heads, head_dim = q.shape
    rows = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    return rows.reshape(batch, kv_heads, -1, head_dim)


def _gather(cache: jax.Array, index: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The pages `index` [B, n] of a cache, one behind the other: [B, K, n * page_size, H]."""
    taken = cache[index].astype(dtype).transpose(0, 2, 1, 3, 4)  # [B, K, n, page_size, H]
    return taken.reshape(*taken.shape[:2], -1, taken.shape[-1])


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum with a float32 result, exact float32 inside if the operands are."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=exact, preferred_element_type=jnp.float32)
