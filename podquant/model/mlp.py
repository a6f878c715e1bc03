"""The gated feed-forward block (arXiv:2002.05202) on one shard of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from podquant.config.scheme import Scheme
from podquant.families.config import ModelConfig
from podquant.model.axes import TP
from podquant.model.linear import Linear, project
from podquant.model.matmul import Numerics

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`; gate and up are cut along their outputs, down along its input.

    Args:
        config: the model.
        schemes: for each projection's name, how it is quantized.
        numerics: what the model computes in.
        layers: how many are stacked.
        width: F; None: the model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        schemes: dict[str, Scheme | None],
        numerics: Numerics,
        layers: int,
        width: int | None = None,
    ) -> None:
        self.activation = config.activation

        def linear(name: str, shape: tuple[int, int], axes: tuple[str, str]) -> Linear:
            return Linear(shape, axes, scheme=schemes[name], numerics=numerics, bias=config.mlp_bias, layers=layers)

        axis = "ffn" if width is None else "shared_ffn"
        width = config.ffn_size if width is None else width
        self.gate_proj = linear("gate_proj", (width, config.hidden_size), (axis, "embed"))
        self.up_proj = linear("up_proj", (width, config.hidden_size), (axis, "embed"))
        self.down_proj = linear("down_proj", (config.hidden_size, width), ("embed", axis))

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
