"""A decoder-only transformer on one shard of a mesh: embedding, layers, output projection.

Layers quantized alike are stacked and scanned over, so a program's size and compile time do not grow with depth; a run
of layers that differ (a rule may keep the first in bf16) is a segment of its own. What weights there are, and of which
shape, is declared (`families.declaration`): `segments[s].layers.self_attn.q_proj.weight[i]` is the weight of the module
`self_attn.q_proj` in layer `start + i`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from podquant.config.scheme import Scheme
from podquant.errors import UnsupportedModelError
from podquant.families.config import ModelConfig
from podquant.families.declaration import Declaration, DeclaredWeight, axis_sizes
from podquant.families.layout import Layout
from podquant.model.attention import Attention
from podquant.model.batch import Batch
from podquant.model.embedding import Embedding
from podquant.model.kv_cache import Cache
from podquant.model.linear import Linear, RMSNorm, at_layer
from podquant.model.matmul import Numerics
from podquant.model.mla import LatentAttention
from podquant.model.mlp import MLP
from podquant.model.moe import MoE
from podquant.model.paged_attention import soft_cap
from podquant.model.parameter import Module, StackedWeight

SchemeOf = Callable[[str], Scheme | None]
"""From a module's name on disk to how it is quantized."""

_INPUT_NORMS = ("input_layernorm", "post_attention_layernorm")
_OUTPUT_NORMS = ("attention_output_norm", "mlp_output_norm")


class DecoderLayer(nnx.Module):
    """Attention and MLP, or experts, each beside a residual, with norms in front of them, behind them or both.

    Args:
        config: the model.
        modules: of the run of layers that are stacked, by name.
        numerics: what it computes in.
        layout: its sizes on the mesh.
        start: the index of the first of the layers.
    """

    def __init__(
        self, config: ModelConfig, modules: Mapping[str, Module], numerics: Numerics, layout: Layout, start: int
    ) -> None:
        def norm(name: str) -> RMSNorm:
            return RMSNorm(modules[name], config.norm_eps, numerics, config.norm_offset)

        self.residual_scale = config.residual_scale
        if config.input_norms:
            self.input_layernorm, self.post_attention_layernorm = map(norm, _INPUT_NORMS)
        if config.output_norms:
            self.attention_output_norm, self.mlp_output_norm = map(norm, _OUTPUT_NORMS)
        attention = Attention if config.latent is None else LatentAttention
        self.self_attn: Attention | LatentAttention = attention(config, modules, numerics)
        self.mlp: MLP | MoE
        if config.has_experts(start):
            self.mlp = MoE(config, modules, numerics, (layout.tp_size, layout.ep_size), start)
        else:
            self.mlp = MLP(config, modules, numerics)

    def __call__(
        self, x: jax.Array, cache: Cache, layer: jax.Array, window: jax.Array, at: Batch
    ) -> tuple[jax.Array, Cache]:
        """One layer on [T, D]; see `Attention`."""
        y, cache = self.self_attn(self._normed("input_layernorm", x), cache, layer, window, at)
        x = self._added(x, self._normed("attention_output_norm", y))
        y = self._normed("post_attention_layernorm", x)
        y = self.mlp(y, layer, at.is_token) if isinstance(self.mlp, MoE) else self.mlp(y)
        return self._added(x, self._normed("mlp_output_norm", y)), cache

    def _normed(self, norm: str, x: jax.Array) -> jax.Array:
        return getattr(self, norm)(x) if hasattr(self, norm) else x

    def _added(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return x + (y if self.residual_scale == 1.0 else y * self.residual_scale)


class Segment(nnx.Module):
    """A run of stacked layers that are quantized alike, scanned over.

    Attributes:
        start: index of the first layer.
        windows: of each layer.
        ropes: of each layer, which of the model's rotations it has; empty: there is one.
        layers: the stacked layers.
    """

    def __init__(self, start: int, windows: tuple[int, ...], layers: DecoderLayer, ropes: tuple[int, ...] = ()) -> None:
        self.start = start
        self.windows = windows
        self.ropes = ropes
        self.layers = layers

    def __call__(self, x: jax.Array, cache: Cache, at: Batch) -> tuple[jax.Array, Cache]:
        """All layers on [T, D]."""
        graph, *states = nnx.split(self.layers, StackedWeight, ...)
        whole, stacked = states  # what loops read of a layer is taken from the stack where they read it
        indices = np.arange(self.start, self.start + len(self.windows), dtype=np.int32)

        def body(
            carry: tuple[jax.Array, Cache],
            layer: tuple[nnx.State[Any, Any], jax.Array, jax.Array, jax.Array | None],
        ) -> tuple[tuple[jax.Array, Cache], None]:
            state, index, window, rope = layer
            layers = at_layer(nnx.merge(graph, whole, state), index - self.start)
            return layers(*carry, index, window, at.of_layer(rope)), None

        ropes = jnp.asarray(self.ropes, jnp.int32) if self.ropes else None
        xs = (stacked, jnp.asarray(indices), jnp.asarray(self.windows, jnp.int32), ropes)
        carry, _ = jax.lax.scan(body, (x, cache), xs)
        return carry


class Decoder(nnx.Module):
    """The whole model. Build it under `nnx.eval_shape`: parameters are declared as zeros.

    Args:
        config: the model.
        declaration: its weights.
        layout: its sizes on the mesh, from `plan_layout`.
        scheme_of: how each module is quantized, by its name on disk.
        numerics: what it computes in.
    """

    def __init__(
        self,
        config: ModelConfig,
        declaration: Declaration,
        layout: Layout,
        scheme_of: SchemeOf,
        numerics: Numerics,
    ) -> None:
        self.embedding_scale, self.logit_scale = config.embedding_scale, config.logit_scale
        self.logit_cap = config.logit_cap
        modules = partial(modules_in, config, declaration, layout, scheme_of)
        outside = modules(None)
        self.embed_tokens = Embedding(outside["embed_tokens"], numerics)
        self.segments = nnx.List(
            Segment(
                start,
                config.windows[start:stop],
                DecoderLayer(config, modules((start, stop)), numerics, layout, start),
                config.layer_ropes[start:stop],
            )
            for start, stop in _runs(declaration, scheme_of, config.num_layers)
        )
        self.norm = RMSNorm(outside["norm"], config.norm_eps, numerics, config.norm_offset)
        if not config.tied_embeddings:
            self.lm_head = Linear(outside["lm_head"], numerics)

    def hidden(self, token_ids: jax.Array, cache: Cache, at: Batch) -> tuple[jax.Array, Cache]:
        """Run int32 ids [T] through all layers: the normalised residual stream [T, D], and the cache."""
        x = self.embed_tokens(token_ids)
        if self.embedding_scale != 1.0:
            x = x * jnp.asarray(self.embedding_scale, x.dtype)  # rounded first, as the models were trained
        for segment in self.segments:
            x, cache = segment(x, cache, at)
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """This shard's logits [M, V / tp] float32 of rows [M, D]; columns from the true V on mean nothing."""
        head = self.lm_head if hasattr(self, "lm_head") else self.embed_tokens.table
        logits = head.product(head.prepare(hidden))
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return soft_cap(logits, self.logit_cap)


def modules_in(
    config: ModelConfig,
    declaration: Declaration,
    layout: Layout,
    scheme_of: SchemeOf,
    layers: tuple[int, int] | None,
) -> Mapping[str, Module]:
    """The modules of a run of layers, as the first one has them, or (None) those outside the layers.

    Raises:
        UnsupportedModelError: experts of a layer are not quantized alike.
    """
    layer = None if layers is None else layers[0]
    sizes = {**axis_sizes(config), "kv_heads": layout.num_kv_heads * config.head_dim, "vocab": layout.vocab_size}
    return {
        name: Module(name, weights, sizes, _scheme(weights["weight"], scheme_of), layers, layout.tp_size)
        for name, weights in declaration.modules[layer].items()
    }


def _runs(declaration: Declaration, scheme_of: SchemeOf, num_layers: int) -> Iterator[tuple[int, int]]:
    """The layers in runs whose modules have the same weights, quantized alike."""

    def what(layer: int) -> list[tuple[object, ...]]:
        return [
            (
                name,
                *((each.name, each.axes, each.shape) for each in weights.values()),
                _scheme(weights["weight"], scheme_of),
            )
            for name, weights in declaration.modules[layer].items()
        ]

    start = 0
    for _, run in groupby(range(num_layers), what):
        stop = start + len(list(run))
        yield start, stop
        start = stop


def _scheme(weight: DeclaredWeight, scheme_of: SchemeOf) -> Scheme | None:
    if weight.kind == "norm":
        return None
    first, *others = (rows.module for rows in weight.places)
    scheme = scheme_of(first)
    for module in others:
        if scheme_of(module) != scheme:
            raise UnsupportedModelError(
                f"{module} is not quantized as {first} is; the experts of a layer are computed together: quantize them "
                "alike, by the `moe:` section and without naming some in `ignored_layers`"
            )
    return scheme
