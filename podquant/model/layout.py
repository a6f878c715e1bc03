"""A decoder laid out over a mesh: each of its arrays with shape, dtype and place, and the cache beside them.

Nothing here holds a weight or runs a program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from podquant.config.scheme import CacheDtype, Scheme
from podquant.families.config import ModelConfig
from podquant.families.declaration import Declaration, DeclaredWeight, declare
from podquant.families.layout import Layout, plan_layout
from podquant.model.axes import LOCAL, RULES, TP, spec_of
from podquant.model.decoder import Decoder, SchemeOf
from podquant.model.kv_cache import CacheLayout, KVCache, cache_layout
from podquant.model.matmul import Numerics
from podquant.model.paged_attention import CHUNK_TOKENS
from podquant.model.parameter import Weight


@dataclass(frozen=True)
class Leaf:
    """One array of weights, as the programs take it, and what is declared of it.

    Attributes:
        path: attribute names and indices from the decoder to it.
        shape, dtype: on the devices, over all shards.
        axes: logical axis of each dimension.
        name: of the parameter: `weight`, `weight_scale`, `bias`.
        weights: what fills it, of each layer that is stacked in it; of scales, the weights that they scale.
        copies: how many shards have a copy of each row, where it is cut along its rows.
        shards: that share out a tensor on disk: all of the mesh; of routed experts those of a group.
        blocks: of scales, see `Slot`.
    """

    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: tuple[str, ...]
    name: str
    weights: tuple[DeclaredWeight, ...]
    copies: int
    shards: int
    blocks: tuple[int, ...] | None = None

    @property
    def is_experts(self) -> bool:
        """Whether it is laid out by shard and expert, in front of the axes that a tensor on disk has."""
        return "shards" in self.axes

    @property
    def num_stacked(self) -> int:
        """Axes in front of those that a tensor on disk has: of layers, shards and experts."""
        return int("layers" in self.axes) + 2 * self.is_experts

    @property
    def cut(self) -> int | None:
        """The axis of a tensor on disk that is shared out; None: every shard has all of it."""
        own = self.axes[self.num_stacked :]
        return next((number for number, axis in enumerate(own) if RULES[axis] == TP or axis in LOCAL), None)

    @property
    def shard_rows(self) -> int:
        """Rows of a shard, where they are shared out."""
        rows = self.shape[self.num_stacked]
        return rows if self.is_experts else rows // self.shards


@dataclass(frozen=True)
class CacheShape:
    """The paged cache.

    Attributes:
        num_pages: in each layer; page 0 takes the writes of padding.
        page_size: tokens in a page.
        num_slots: sequences that run at a time.
        context_length: tokens of the longest sequence.
        dtype: of keys and values.
        num_drafts: tokens of each sequence that are guessed at a time.
    """

    num_pages: int
    page_size: int
    num_slots: int
    context_length: int
    dtype: CacheDtype = "auto"
    num_drafts: int = 0

    @property
    def table_width(self) -> int:
        """Entries of a page table: enough for the context, a whole number of attention chunks."""
        chunk = max(CHUNK_TOKENS, self.page_size)
        return -(-self.context_length // chunk) * (chunk // self.page_size)


class Model:
    """A decoder laid out over a mesh, without its weights.

    Args:
        config: the model.
        scheme_of: how each module is quantized, by its name on disk.
        numerics: what it computes in.
        mesh: one axis, `tp`; abstract where nothing is to run.
        ep_size: groups of its devices among which routed experts are shared out.
        declaration: the model's, where it has been made already.

    Attributes:
        declaration: all its weights.
        leaves: its arrays, in the order in which programs take them.
        modules: for each module, of all layers stacked in it, the indices of its leaves by name.
        schemes: those its modules are quantized by.

    Raises:
        MeshError: the model cannot be cut into that many shards.
    """

    def __init__(
        self,
        config: ModelConfig,
        scheme_of: SchemeOf,
        numerics: Numerics,
        mesh: Mesh | AbstractMesh,
        ep_size: int = 1,
        declaration: Declaration | None = None,
    ) -> None:
        self.config = config
        self.numerics = numerics
        self.declaration = declaration or declare(config)
        self.schemes: set[Scheme] = set()
        self.mesh = cast(Mesh, mesh)  # an abstract one has all that is asked of it until weights are loaded
        self.layout: Layout = plan_layout(config, mesh.size, ep_size)

        def scheme_seen(module: str) -> Scheme | None:
            scheme = scheme_of(module)
            if scheme is not None:
                self.schemes.add(scheme)
            return scheme

        abstract = nnx.eval_shape(lambda: Decoder(config, self.declaration, self.layout, scheme_seen, numerics))
        self.graph, state = nnx.split(abstract)
        self._tree = jax.tree.structure(state)
        flat = nnx.to_flat_state(state)
        self.leaves = tuple(self._leaf(path, weight) for path, weight in flat)
        modules: dict[tuple[object, ...], dict[str, int]] = {}
        for index, (leaf, (_, weight)) in enumerate(zip(self.leaves, flat, strict=True)):
            modules.setdefault((weight.slot.module, weight.slot.layers), {})[leaf.name] = index
        self.modules = tuple(modules.values())

    def _leaf(self, path: Any, weight: Any) -> Leaf:
        assert isinstance(weight, Weight)
        value, slot = weight.get_value(), weight.slot
        layers = (None,) if slot.layers is None else range(*slot.layers)
        declared = tuple(self.declaration.modules[layer][slot.module][slot.name] for layer in layers)
        copies = self.layout.num_kv_heads // self.config.num_kv_heads if declared[0].axes[0] == "kv_heads" else 1
        shards = self.layout.tp_size // (self.layout.ep_size if declared[0].kind == "expert" else 1)
        axes, dtype = tuple(weight.axes), np.dtype(value.dtype)
        return Leaf(tuple(path), tuple(value.shape), dtype, axes, str(path[-1]), declared, copies, shards, slot.blocks)

    @cached_property
    def shardings(self) -> tuple[NamedSharding, ...]:
        """Where each leaf lies."""
        return tuple(NamedSharding(self.mesh, spec_of(leaf.axes)) for leaf in self.leaves)

    def decoder(self, weights: Sequence[jax.Array]) -> Decoder:
        """The module with its weights (a shard's, inside `shard_map`)."""
        return nnx.merge(self.graph, jax.tree.unflatten(self._tree, weights))

    def cache_layout(self, dtype: CacheDtype) -> CacheLayout:
        """What the cache keeps of a token."""
        return cache_layout(self.config, self.layout.num_kv_heads, dtype, self.numerics.dtype)

    def cache_arrays(self, shape: CacheShape) -> KVCache[jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of the cache's arrays."""
        kept = self.cache_layout(shape.dtype)
        num_pages = self.config.num_layers * shape.num_pages

        def codes(width: int) -> jax.ShapeDtypeStruct:
            dims, sharding = (num_pages, kept.heads, shape.page_size, width), spec_of(kept.axes)
            return jax.ShapeDtypeStruct(dims, jnp.dtype(kept.dtype), sharding=NamedSharding(self.mesh, sharding))

        def scales(width: int) -> jax.ShapeDtypeStruct | None:
            if not kept.is_quantized or not width:
                return None
            dims, sharding = (kept.heads, num_pages, shape.page_size), spec_of(kept.scale_axes)
            return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(self.mesh, sharding))

        widths = (kept.key_dim, kept.value_dim)
        return KVCache(*map(codes, widths), *map(scales, widths))
