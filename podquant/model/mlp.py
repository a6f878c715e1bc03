"""The gated feed-forward block (arXiv:2002.05202) on one shard of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from podquant.families.config import ModelConfig
from podquant.model.axes import TP
from podquant.model.linear import Linear, project
from podquant.model.matmul import Numerics
from podquant.model.parameter import Module

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`; gate and up are cut along their outputs, down along its input.

    Args:
        config: the model.
        modules: of the layer, by name.
        numerics: what the model computes in.
        block: what its projections are below.
    """

    def __init__(
        self, config: ModelConfig, modules: Mapping[str, Module], numerics: Numerics, block: str = "mlp"
    ) -> None:
        self.activation = config.activation
        self.gate_proj = Linear(modules[f"{block}.gate_proj"], numerics)
        self.up_proj = Linear(modules[f"{block}.up_proj"], numerics)
        self.down_proj = Linear(modules[f"{block}.down_proj"], numerics)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[M, D] to [M, D]."""
        return self.down_proj(self._inner(x))

    def partial(self, x: jax.Array) -> jax.Array:
        """This shard's part of the result on [M, D], to be added to those of the others: [M, D] float32, no bias."""
        down = self.down_proj
        y = down.product(down.prepare(self._inner(x)))
        # What is summed already counts once.
        return jnp.where(jax.lax.axis_index(TP) == 0, y, 0.0) if down.sums_exactly else y

    def _inner(self, x: jax.Array) -> jax.Array:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return ACTIVATIONS[self.activation](gate) * up
