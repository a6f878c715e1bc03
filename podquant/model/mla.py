"""Multi-head latent attention (arXiv:2405.04434) on one shard of a mesh, absorbed: the context is never expanded.

A head's key is `[W_UK c, k_rope]` and its value `W_UV c`, of the token's latent vector c and a rotated key that all
heads share; W_UK and W_UV are rows of kv_b_proj. Since `q . (W_UK c) = (W_UK^T q) . c`, W_UK is applied to the query
and W_UV to what attention gives of the latents themselves: to attention this is one key/value head, whose value is the
front of its key. The cache holds `[c, k_rope]` of each token, whole on every shard; heads are shared out.

Prefill goes the same way. At DeepSeek's sizes a query and a key then take 2 (576 + 512) operations a head instead of
2 (192 + 128), 3.4 times as many, but no key or value of the context has to be recomputed for each chunk of a prompt.

Both products read kv_b_proj's codes as they are. A row of W_UK is an input here, so its scale multiplies the query in
front of the product; a row of W_UV is an output, so its scale multiplies behind it. With quantized activations it is c
that kv_b_proj quantizes per token: here too, before c is cached, so the scores and values are those of the expanded
form; the absorbed query and attention's result, which no linear of the checkpoint takes, stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from podquant.families.config import ModelConfig
from podquant.families.latent import LatentConfig
from podquant.model.axes import block_axis
from podquant.model.batch import Batch
from podquant.model.kv_cache import Cache, write
from podquant.model.linear import Linear, RMSNorm, project
from podquant.model.matmul import Numerics, stored_dtype
from podquant.model.paged_attention import attend
from podquant.model.parameter import Module
from podquant.model.rope import rotate
from podquant.quantize.activations import quantize_per_token

_NORM_EPS = 1e-6
"""Of the two inner norms: the modeling files of all these models leave it at this, whatever `rms_norm_eps` says."""


class LatentAttention(nnx.Module):
    """Projections to and from latent attention over a paged cache of latents.

    Args:
        config: the model; `config.latent` is set.
        modules: of the layer, by name.
        numerics: what the model computes in.
    """

    def __init__(self, config: ModelConfig, modules: Mapping[str, Module], numerics: Numerics) -> None:
        assert config.latent is not None
        self.latent = latent = config.latent
        if latent.q_rank is None:
            self.q_proj = Linear(modules["self_attn.q_proj"], numerics)
        else:
            self.q_a_proj = Linear(modules["self_attn.q_a_proj"], numerics)
            self.q_a_layernorm = RMSNorm(modules["self_attn.q_a_layernorm"], _NORM_EPS, numerics)
            self.q_b_proj = Linear(modules["self_attn.q_b_proj"], numerics)
        self.kv_a_proj_with_mqa = Linear(modules["self_attn.kv_a_proj_with_mqa"], numerics)
        self.kv_a_layernorm = RMSNorm(modules["self_attn.kv_a_layernorm"], _NORM_EPS, numerics)
        self.kv_b_proj = Expansion(latent, modules["self_attn.kv_b_proj"], numerics)
        self.o_proj = Linear(modules["self_attn.o_proj"], numerics)
        # XLA:CPU has fast float32 dots of any shape, and none in bf16 for a single row.
        self.score_dtype = "float32" if numerics.platform == "cpu" else numerics.dtype

    def __call__(
        self, x: jax.Array, cache: Cache, layer: jax.Array, window: jax.Array, at: Batch
    ) -> tuple[jax.Array, Cache]:
        """Attend; see `Attention`. The cache has one head, and no values."""
        latent, num_tokens = self.latent, x.shape[0]
        q, compressed = self._project(x)
        q = q.reshape(num_tokens, -1, latent.nope_dim + latent.rope_dim)
        q_rope = self._rotate(q[..., latent.nope_dim :], at)
        context = self.kv_b_proj.quantized(self.kv_a_layernorm(compressed[:, : latent.kv_rank]))
        k_rope = self._rotate(compressed[:, None, latent.kv_rank :], at)
        base = layer * at.pages_per_layer
        cache = write(cache, self._cached(context[:, None], k_rope), None, base, at)
        q_latent = self.kv_b_proj.absorb(q[..., : latent.nope_dim]).astype(self.score_dtype)
        queries = self._cached(q_latent, q_rope.astype(self.score_dtype))
        y = attend(queries, cache, base, window, at, scale=latent.score_scale, value_dim=latent.kv_rank)
        y = self.kv_b_proj.values(y)
        return self.o_proj(y.astype(x.dtype).reshape(num_tokens, -1)), cache

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """This shard's queries [M, N * (nope + rope)], and latent with shared key [M, kv_rank + rope]."""
        if self.latent.q_rank is None:
            q, compressed = project(x, self.q_proj, self.kv_a_proj_with_mqa)
            return q, compressed
        q, compressed = project(x, self.q_a_proj, self.kv_a_proj_with_mqa)
        return self.q_b_proj(self.q_a_layernorm(q)), compressed

    def _cached(self, latents: jax.Array, rotated: jax.Array) -> jax.Array:
        """Side by side as the cache has them: [..., kv_rank] and [..., rope] to [..., cached_dim]."""
        joined = jnp.concatenate([latents, rotated], axis=-1)
        missing = self.latent.cached_dim - joined.shape[-1]
        return jnp.pad(joined, ((0, 0),) * (joined.ndim - 1) + ((0, missing),))

    def _rotate(self, x: jax.Array, at: Batch) -> jax.Array:
        """Rotate heads [T, heads, rope]; the result has its pairs half the width apart, as only products see it."""
        if self.latent.interleaved:
            x = jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
        return rotate(x, at.cos_sin)


class Expansion(nnx.Module):
    """kv_b_proj [N * (nope + value), rank], cut by heads, and the two halves of it that absorbed attention applies.

    The weight is declared in the type its products take: as on disk, but on XLA:CPU, which has fast products of float32
    for any shape, in float32, where every code and every bfloat16 is exact.
    """

    def __init__(self, latent: LatentConfig, module: Module, numerics: Numerics) -> None:
        (rows, _), scheme = module.shape, module.scheme
        self.nope_dim, self.rank = latent.nope_dim, latent.kv_rank
        self.head_rows = latent.nope_dim + latent.value_dim
        self.dtype = numerics.dtype
        self.product_dtype = "float32" if numerics.platform == "cpu" else numerics.dtype
        self.activation_dtype = scheme.activation_dtype if scheme else None
        block = scheme.weight_block_size if scheme else None
        self.blocks = 1 if block is None else -(-self.rank // block[1])
        width = self.rank if block is None or self.blocks == 1 else self.blocks * block[1]
        stored = stored_dtype(scheme, numerics) if scheme and numerics.platform != "cpu" else self.product_dtype
        self.weight = module.parameter("weight", stored, (rows, width))
        if scheme is not None:
            axes = (module.axes[0], block_axis(module.axes[1], self.blocks))
            self.weight_scale = module.parameter("weight", "float32", (rows, self.blocks), axes)

    def quantized(self, context: jax.Array) -> jax.Array:
        """Latents [M, rank] as the product with kv_b_proj sees them: the same, or rounded to codes per token."""
        if self.activation_dtype is None:
            return context
        codes, scale = quantize_per_token(context, self.activation_dtype)
        return (codes.astype(jnp.float32) * scale).astype(context.dtype)

    def absorb(self, q: jax.Array) -> jax.Array:
        """W_UK^T q: [M, N, nope] to [M, N, rank] float32."""
        wide = q.astype(jnp.float32)[:, :, None, :]
        if hasattr(self, "weight_scale"):
            wide = wide * self._scales(0, self.nope_dim).transpose(0, 2, 1)[None]
        # [M, N, blocks, nope] with [N, nope, blocks, columns], over nope.
        y = self._product(wide, self._codes(0, self.nope_dim), 1)
        return y.transpose(2, 0, 1, 3).reshape(*q.shape[:2], -1)[..., : self.rank]

    def values(self, y: jax.Array) -> jax.Array:
        """W_UV y: [M, N, rank] to [M, N, value] float32."""
        codes = self._codes(self.nope_dim, self.head_rows)
        columns = codes.shape[3]
        padded = jnp.pad(y, ((0, 0), (0, 0), (0, self.blocks * columns - self.rank)))
        # [M, N, blocks, columns] with [N, value, blocks, columns], over columns.
        parts = self._product(padded.reshape(*y.shape[:2], self.blocks, columns), codes, 3)
        if hasattr(self, "weight_scale"):
            parts = parts * self._scales(self.nope_dim, self.head_rows).transpose(0, 2, 1)[:, :, None, :]
        return parts.sum(axis=1).transpose(1, 0, 2)

    def _codes(self, first: int, last: int) -> jax.Array:
        """Rows of each head: [N, rows, blocks, columns]."""
        weight = self.weight[...]
        return weight.reshape(-1, self.head_rows, self.blocks, weight.shape[-1] // self.blocks)[:, first:last]

    def _scales(self, first: int, last: int) -> jax.Array:
        """Of rows of each head: [N, rows, blocks]."""
        return self.weight_scale[...].reshape(-1, self.head_rows, self.blocks)[:, first:last]

    def _product(self, rows: jax.Array, codes: jax.Array, over: int) -> jax.Array:
        """[M, N, blocks, k] by [N, ., blocks, .] over axis `over` of the codes: [N, blocks, M, ...] float32."""
        exact = self.product_dtype == "float32"
        return jax.lax.dot_general(
            rows.astype(self.product_dtype),
            codes,
            (((3,), (over,)), ((1, 2), (0, 2))),
            precision=jax.lax.Precision.HIGHEST if exact else None,
            preferred_element_type=jnp.float32,
        )
