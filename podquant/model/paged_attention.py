"""Attention of a flat batch over the paged cache, in plain JAX: any device, any dtype, any mesh.

Rows are taken in tiles: several rows of one token each, or a run of tokens of one longer row. A tile walks the pages of
its rows in chunks with a running softmax (arXiv:2205.14135), as many as its longest row needs: one program for every
context length, and no more memory than a chunk. Tiles that a step does not have cost nothing. The loops have names in
the compiled program, by which `engine.ahead` knows how often they run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from podquant.model.batch import Batch
from podquant.model.kv_cache import Cache, gather, gather_scales

CHUNK_TOKENS = 256
"""Positions of the context that one round of the running softmax takes."""

TILE_ROWS = 8
"""Rows of one token in a tile. More would all walk as far as the longest of them."""

_TILE_TOKENS = 64


def tile_tokens(num_tokens: int) -> int:
    """Tokens of a longer row in a tile, in a step of so many: few in small steps, where rows are short."""
    return _TILE_TOKENS if num_tokens > _TILE_TOKENS else min(_TILE_TOKENS // 4, num_tokens)


_FLOOR = -1e38
"""The running maximum before any score: finite, so that a chunk a row sees nothing of gives exp(-inf) = 0, not NaN."""


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap * tanh(x / cap)` (arXiv:2408.00118); None: `x`."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    q: jax.Array,
    cache: Cache,
    base: jax.Array,
    window: jax.Array,
    at: Batch,
    *,
    scale: float | None = None,
    value_dim: int | None = None,
    cap: float | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v over each token's own and earlier positions within `window`.

    Args:
        q: [T, N, H], rotated.
        cache: keys and values, this step's included.
        base: int32 scalar, index of this layer's first page.
        window: int32 scalar.
        at: where the tokens stand.
        scale, cap: of the scores, which are capped once scaled, see `soft_cap`; scale None: 1 / sqrt(H).
        value_dim: a value is the first so many numbers of its key; None: it is in the cache of values.

    Returns:
        [T, N, H or value_dim] float32; of padding, whatever is finite.
    """
    num_tokens, heads, head_dim = q.shape
    pages = _Pages(cache, base, window, head_dim**-0.5 if scale is None else scale, cap, value_dim)
    tile_rows, row_tokens = min(TILE_ROWS, len(at.lengths)), tile_tokens(num_tokens)
    padding = max(tile_rows, row_tokens)  # the last tile may reach behind the last token
    queries = jnp.pad(q, ((0, padding), (0, 0), (0, 0)))
    starts, table = (jnp.pad(each, ((0, tile_rows), (0, 0))[: each.ndim]) for each in (at.starts, at.page_table))

    def short_rows(tile: jax.Array, out: jax.Array) -> jax.Array:
        first = tile * tile_rows
        mine = first + jnp.arange(tile_rows, dtype=jnp.int32) < num_short
        own = jax.lax.dynamic_slice_in_dim(starts, first, tile_rows)
        positions = jnp.where(mine, own, own[0])  # rows that are not of the tile lengthen nobody's walk
        q = jax.lax.dynamic_slice_in_dim(queries, first, tile_rows)[:, None]
        y = pages.walk(q, positions[:, None], jax.lax.dynamic_slice_in_dim(table, first, tile_rows))
        return jax.lax.dynamic_update_slice_in_dim(out, y[:, 0], first, 0)

    def long_row(tile: jax.Array, out: jax.Array) -> jax.Array:
        row = (ends <= tile).sum(dtype=jnp.int32)
        skipped = (tile - ends[row] + tiles[row]) * row_tokens
        offsets = jnp.minimum(skipped + jnp.arange(row_tokens, dtype=jnp.int32), at.lengths[row] - 1)
        first = at.firsts[row] + skipped
        q = jax.lax.dynamic_slice_in_dim(queries, first, row_tokens)[None]
        y = pages.walk(q, (at.starts[row] + offsets)[None], at.page_table[row][None])
        # What lies behind the row's end is of rows that come later, and overwrite it.
        return jax.lax.dynamic_update_slice_in_dim(out, y[0], first, 0)

    num_short = (at.lengths == 1).sum(dtype=jnp.int32)
    out = jnp.zeros((num_tokens + padding, heads, pages.width), jnp.float32)
    out = _repeat("short_rows", -(-num_short // tile_rows), short_rows, out)
    if num_tokens > 1:
        tiles = jnp.where(at.lengths > 1, -(-at.lengths // row_tokens), 0)
        ends = jnp.cumsum(tiles)
        out = _repeat("long_rows", ends[-1], long_row, out)
    return jax.lax.slice_in_dim(out, 0, num_tokens)


def _repeat(
    name: str, times: jax.Array, body: Callable[[jax.Array, jax.Array], jax.Array], out: jax.Array
) -> jax.Array:
    with jax.named_scope(name):
        result: jax.Array = jax.lax.fori_loop(jnp.int32(0), times, body, out)
    return result


@dataclass(frozen=True)
class _Pages:
    """The keys and values of one layer, and how tokens score them; see `attend`."""

    cache: Cache
    base: jax.Array
    window: jax.Array
    scale: float
    cap: float | None
    value_dim: int | None

    @property
    def width(self) -> int:
        """Numbers of a value."""
        return self.cache.values.shape[3] if self.value_dim is None else self.value_dim

    def walk(self, q: jax.Array, positions: jax.Array, page_table: jax.Array) -> jax.Array:
        """Attention of a tile: q [B, L, N, H] at positions [B, L] over pages [B, W], to [B, L, N, width] float32."""
        batch, length, heads, _ = q.shape
        kv_heads, page_size = self.cache.keys.shape[1:3]
        pages = max(1, min(CHUNK_TOKENS // page_size, page_table.shape[1]))
        chunk = pages * page_size
        rows = _by_kv_head(q, kv_heads)
        row_positions = jnp.tile(positions, (1, heads // kv_heads))[:, None, :, None]

        def body(
            step: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            best, total, acc = carry
            index = self.base + jax.lax.dynamic_slice_in_dim(page_table, step * pages, pages, axis=1)
            key_scales, value_scales = self._scales(index)
            keys = gather(self.cache.keys, index, q.dtype)
            values = keys[..., : self.value_dim]
            if self.value_dim is None:
                values = gather(self.cache.values, index, q.dtype)
            scores = soft_cap(_product("bkrh,bksh->bkrs", rows, keys) * (self.scale * key_scales), self.cap)
            seen_from = (step * chunk + jnp.arange(chunk, dtype=jnp.int32)).reshape(1, 1, 1, chunk)
            seen = (seen_from <= row_positions) & (seen_from > row_positions - self.window)
            scores = jnp.where(seen, scores, -jnp.inf)
            new_best = jnp.maximum(best, scores.max(axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - new_best), jnp.exp(best - new_best)
            total = total * shrink + weights.sum(axis=-1, keepdims=True)
            part = _product("bkrs,bksh->bkrh", (weights * value_scales).astype(q.dtype), values)
            return new_best, total, acc * shrink + part

        shape = rows.shape[:3]
        start = (
            jnp.full((*shape, 1), _FLOOR, jnp.float32),
            jnp.zeros((*shape, 1), jnp.float32),
            jnp.zeros((*shape, self.width), jnp.float32),
        )
        first = jnp.maximum(positions[:, 0].min() - self.window + 1, 0) // chunk
        last = positions.max() // chunk + 1
        with jax.named_scope("walk"):
            _, total, acc = jax.lax.fori_loop(first, last, body, start)
        y = (acc / total).reshape(batch, kv_heads, -1, length, self.width)
        result: jax.Array = y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, self.width)
        return result

    def _scales(self, index: jax.Array) -> tuple[jax.Array | float, jax.Array | float]:
        """Of the keys and the values in the pages `index`: float32 [B, K, 1, S], or 1 where they are plain."""
        keys, values = self.cache.key_scales, self.cache.value_scales
        if keys is None:
            return 1.0, 1.0
        key_scales = gather_scales(keys, index)
        return key_scales, key_scales if values is None else gather_scales(values, index)


def _by_kv_head(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, L, N, H] to [B, K, G * L, H]: the query heads that share a key/value head become rows of one product."""
    batch, length, heads, head_dim = q.shape
    rows = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    return rows.reshape(batch, kv_heads, -1, head_dim)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """An einsum with a float32 result, exact float32 inside if the operands are."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=exact, preferred_element_type=jnp.float32)
