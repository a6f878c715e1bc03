"""A decoder-only transformer on one shard of a mesh: embedding, layers, output projection.

Layers quantized alike are stacked and scanned over, so a program's size and compile time do not grow with depth; a run
of layers that differ (a rule may keep the first in bf16) is a segment of its own. Attribute paths follow the names that
a Llama has on disk: `segments[s].layers.self_attn.q_proj.weight[i]` is `self_attn.q_proj.weight` below
`model.layers.{start + i}`; `config.names` knows what other families call it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from podquant.config.scheme import Scheme
from podquant.errors import UnsupportedModelError
from podquant.families.config import ModelConfig
from podquant.families.layout import Layout
from podquant.model.attention import Attention, KVCache, Positions, soft_cap
from podquant.model.embedding import Embedding
from podquant.model.linear import Linear, RMSNorm
from podquant.model.matmul import Numerics
from podquant.model.mla import LatentAttention, projections_of
from podquant.model.mlp import MLP
from podquant.model.moe import MoE, expert_names, modules_of
from podquant.model.parameter import ExpertWeight

SchemeOf = Callable[[str], Scheme | None]
"""From a module's name on disk to how it is quantized."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


class DecoderLayer(nnx.Module):
    """Attention and MLP, or experts, each beside a residual, with norms in front of them, behind them or both.

    `layers` of them, from `start` on, are stacked.
    """

    def __init__(
        self,
        config: ModelConfig,
        schemes: Mapping[str, Scheme | None],
        numerics: Numerics,
        layout: Layout,
        layers: int,
        start: int,
    ) -> None:
        attention = {name: schemes[f"self_attn.{name}"] for name in _attention_names(config)}
        mlp = {name.removeprefix("mlp."): scheme for name, scheme in schemes.items() if name.startswith("mlp.")}

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.norm_eps, numerics, layers, offset=config.norm_offset)

        self.residual_scale = config.residual_scale
        if config.input_norms:
            self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        if config.output_norms:
            self.attention_output_norm, self.mlp_output_norm = norm(), norm()
        self.self_attn: Attention | LatentAttention
        if config.latent is None:
            self.self_attn = Attention(config, attention, numerics, layout.num_kv_heads, layers)
        else:
            self.self_attn = LatentAttention(config, attention, numerics, layers)
        self.mlp: MLP | MoE
        if config.has_experts(start):
            self.mlp = MoE(config, mlp, numerics, (layout.tp_size, layout.ep_size), layers, start)
        else:
            self.mlp = MLP(config, mlp, numerics, layers)

    def __call__(
        self, x: jax.Array, cache: KVCache, layer: jax.Array, window: jax.Array, at: Positions
    ) -> tuple[jax.Array, KVCache]:
        """One layer on [M, D]; see `Attention`."""
        y, cache = self.self_attn(self._normed("input_layernorm", x), cache, layer, window, at)
        x = self._added(x, self._normed("attention_output_norm", y))
        y = self._normed("post_attention_layernorm", x)
        y = self.mlp(y, layer) if isinstance(self.mlp, MoE) else self.mlp(y)
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

    def __call__(self, x: jax.Array, cache: KVCache, at: Positions) -> tuple[jax.Array, KVCache]:
        """All layers on [M, D]."""
        graph, *states = nnx.split(self.layers, ExpertWeight, ...)
        whole, stacked = states  # experts are taken from the stack where they are computed
        indices = np.arange(self.start, self.start + len(self.windows), dtype=np.int32)

        def body(
            carry: tuple[jax.Array, KVCache], layer: tuple[nnx.State[Any, Any], jax.Array, jax.Array, jax.Array | None]
        ) -> tuple[tuple[jax.Array, KVCache], None]:
            state, index, window, rope = layer
            return nnx.merge(graph, whole, state)(*carry, index, window, at.of_layer(rope)), None

        ropes = jnp.asarray(self.ropes, jnp.int32) if self.ropes else None
        xs = (stacked, jnp.asarray(indices), jnp.asarray(self.windows, jnp.int32), ropes)
        carry, _ = jax.lax.scan(body, (x, cache), xs)
        return carry


class Decoder(nnx.Module):
    """The whole model. Build it under `nnx.eval_shape`: parameters are declared as zeros.

    Args:
        config: the model.
        layout: its sizes on the mesh, from `plan_layout`.
        scheme_of: how each module is quantized, by its name on disk.
        numerics: what it computes in.
    """

    def __init__(self, config: ModelConfig, layout: Layout, scheme_of: SchemeOf, numerics: Numerics) -> None:
        names = config.names
        self.embedding_scale, self.logit_scale = config.embedding_scale, config.logit_scale
        self.logit_cap = config.logit_cap
        self.embed_tokens = Embedding(layout.vocab_size, config.hidden_size, scheme_of(names.embed_tokens), numerics)
        self.segments = nnx.List(
            Segment(
                start,
                config.windows[start:stop],
                DecoderLayer(config, dict(schemes), numerics, layout, stop - start, start),
                config.layer_ropes[start:stop],
            )
            for start, stop, schemes in _segments(config, scheme_of)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, numerics, offset=config.norm_offset)
        if not config.tied_embeddings:
            self.lm_head = Linear(
                (layout.vocab_size, config.hidden_size),
                ("vocab", "embed"),
                scheme=scheme_of(names.lm_head),
                numerics=numerics,
            )

    def hidden(self, token_ids: jax.Array, cache: KVCache, at: Positions) -> tuple[jax.Array, KVCache]:
        """Run int32 ids [B, T] through all layers: the normalised residual stream [B * T, D], and the cache."""
        x = self.embed_tokens(token_ids.reshape(-1))
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


def _attention_names(config: ModelConfig) -> tuple[str, ...]:
    return _ATTENTION if config.latent is None else projections_of(config.latent)


def _segments(config: ModelConfig, scheme_of: SchemeOf) -> list[tuple[int, int, tuple[tuple[str, Scheme | None], ...]]]:
    segments = []
    start = 0
    for schemes, run in groupby(_layer_schemes(config, scheme_of, layer) for layer in range(config.num_layers)):
        stop = start + len(list(run))
        segments.append((start, stop, schemes))
        start = stop
    return segments


def _layer_schemes(config: ModelConfig, scheme_of: SchemeOf, layer: int) -> tuple[tuple[str, Scheme | None], ...]:
    """The modules of a layer and how each is quantized: layers alike have the same."""
    moe = config.moe if config.has_experts(layer) else None
    names = [f"self_attn.{name}" for name in _attention_names(config)] + (
        modules_of(moe) if moe else [f"mlp.{n}" for n in _MLP]
    )
    return tuple((name, _scheme(config, scheme_of, layer, name)) for name in names)


def _scheme(config: ModelConfig, scheme_of: SchemeOf, layer: int, name: str) -> Scheme | None:
    if config.moe is None or not name.startswith("mlp.experts."):
        return scheme_of(config.names.in_layer(layer, name).module)
    names = expert_names(name, config.moe.num_experts)
    modules = [config.names.in_layer(layer, each).module for each in names]
    scheme = scheme_of(modules[0])
    for module in modules:
        if scheme_of(module) != scheme:
            raise UnsupportedModelError(
                f"{module} is not quantized as {modules[0]} is; the experts of a layer are computed together: quantize "
                "them alike, by the `moe:` section and without naming some in `ignored_layers`"
            )
    return scheme
