"""The gated feed-forward block (arXiv:2002.05202) on one shard of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
from flax import nnx

from podquant.config.scheme import Scheme
from podquant.model.config import ModelConfig
from podquant.model.linear import Linear, project
from podquant.model.matmul import Numerics

_ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
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
    """

    def __init__(self, config: ModelConfig, schemes: dict[str, Scheme | None], numerics: Numerics, layers: int) -> None:
        self.activation = config.activation

        def linear(name: str, shape: tuple[int, int], axes: tuple[str, str]) -> Linear:
            return Linear(shape, axes, scheme=schemes[name], numerics=numerics, bias=config.mlp_bias, layers=layers)

        wide = (config.ffn_size, config.hidden_size)
        self.gate_proj = linear("gate_proj", wide, ("ffn", "embed"))
        self.up_proj = linear("up_proj", wide, ("ffn", "embed"))
        self.down_proj = linear("down_proj", (config.hidden_size, config.ffn_size), ("embed", "ffn"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[M, D] to [M, D]."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(_ACTIVATIONS[self.activation](gate) * up)
