"""Grouped-query attention on one shard of a mesh: the projections around attention over the paged cache."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx

from podquant.families.config import ModelConfig
from podquant.model.batch import Batch
from podquant.model.kv_cache import Cache, write
from podquant.model.linear import Linear, RMSNorm, project
from podquant.model.matmul import Numerics
from podquant.model.paged_attention import attend
from podquant.model.parameter import Module
from podquant.model.rope import rotate


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
        self, x: jax.Array, cache: Cache, layer: jax.Array, window: jax.Array, at: Batch
    ) -> tuple[jax.Array, Cache]:
        """Attend.

        Args:
            x: [T, D].
            cache: of all layers; this step's keys and values are written into it.
            layer: int32 scalar, this layer's index.
            window: int32 scalar, positions attended over.
            at: where the tokens stand.

        Returns:
            [T, D] and the cache.
        """
        num_tokens = x.shape[0]
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        if self.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.reshape(num_tokens, -1, self.head_dim) for y in (q, k, v))
        if hasattr(self, "q_norm") and not self.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, at.cos_sin), rotate(k, at.cos_sin)
        if at.query_scale is not None:
            q = q * at.query_scale.astype(q.dtype)
        base = layer * at.pages_per_layer
        cache = write(cache, k, v, base, at)
        y = attend(q.astype(self.score_dtype), cache, base, window, at, scale=self.score_scale, cap=self.score_cap)
        return self.o_proj(y.astype(x.dtype).reshape(num_tokens, -1)), cache
