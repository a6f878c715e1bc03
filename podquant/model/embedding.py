"""The token embedding, cut along the vocabulary, and its use as the output projection."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from podquant.model.axes import TP
from podquant.model.linear import Linear
from podquant.model.matmul import Numerics
from podquant.model.parameter import Module


class Embedding(nnx.Module):
    """A table [V, D], plain or quantized per row, whose rows are shared out among the shards.

    The table is a `Linear`: a tied model projects with the same codes and scales that it looks up.

    Args:
        module: its declaration; V on the devices is a multiple of the number of shards.
        numerics: what the model computes in.
    """

    def __init__(self, module: Module, numerics: Numerics) -> None:
        self.hidden_size = module.shape[1]
        self.table = Linear(module, numerics)

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        """Look up int32 ids [...]: [..., D] in the model's dtype. One all-reduce."""
        table = self.table.weight[...]
        local = token_ids - jax.lax.axis_index(TP) * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        rows = jnp.where(mine, local, 0)
        x = table[rows][..., : self.hidden_size].astype(jnp.float32)
        if hasattr(self.table, "weight_scale"):
            x = x * self._row_scales(rows)
        x = jnp.where(mine[..., None], x, 0.0).astype(self.table.dtype)
        total: jax.Array = jax.lax.psum(x, TP)
        return total

    def _row_scales(self, rows: jax.Array) -> jax.Array:
        scale = self.table.weight_scale[...][rows]
        blocks = self.table.form.blocks
        if blocks is None:
            return scale
        return jnp.repeat(scale, blocks.size, axis=-1)[..., : self.hidden_size]
