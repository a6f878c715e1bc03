"""A decoder laid out over a mesh: each of its arrays with shape, dtype and place, and the cache beside them.

Nothing here holds a weight or runs a program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from podquant.config.scheme import Scheme
from podquant.errors import MeshError
from podquant.families.config import ModelConfig
from podquant.families.layout import Layout, plan_layout
from podquant.model.attention import CHUNK_TOKENS, CacheLayout, cache_layout
from podquant.model.axes import spec_of
from podquant.model.decoder import Decoder, SchemeOf
from podquant.model.matmul import Numerics
from podquant.model.parameter import Weight

_REPLICATED = PartitionSpec()


@dataclass(frozen=True)
class Leaf:
    """One array of weights, as the programs take it.

    Attributes:
        path: attribute names and indices from the decoder to it.
        shape, dtype: on the devices, over all shards.
        axes: logical axis of each dimension.
    """

    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: tuple[str, ...]


@dataclass(frozen=True)
class CacheShape:
    """The paged cache.

    Attributes:
        num_pages: in each layer; page 0 takes the writes of padding.
        page_size: tokens in a page.
        num_slots: rows of last tokens, one for each sequence that runs.
        context_length: tokens of the longest sequence.
    """

    num_pages: int
    page_size: int
    num_slots: int
    context_length: int

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
        mesh: one axis, `tp`.
        ep_size: groups of its devices among which routed experts are shared out.

    Attributes:
        schemes: those its modules are quantized by.

    Raises:
        MeshError: the model cannot be cut into that many shards.
    """

    def __init__(
        self, config: ModelConfig, scheme_of: SchemeOf, numerics: Numerics, mesh: Mesh, ep_size: int = 1
    ) -> None:
        self.config = config
        self.numerics = numerics
        self.schemes: set[Scheme] = set()
        self.mesh = mesh
        self.layout: Layout = plan_layout(config, mesh.size, ep_size)

        def scheme_seen(module: str) -> Scheme | None:
            scheme = scheme_of(module)
            if scheme is not None:
                self.schemes.add(scheme)
            return scheme

        abstract = nnx.eval_shape(lambda: Decoder(config, self.layout, scheme_seen, numerics))
        self.graph, state = nnx.split(abstract)
        self._tree = jax.tree.structure(state)
        self.leaves = tuple(_leaf(path, weight) for path, weight in nnx.to_flat_state(state))
        self.segments = tuple((s.start, s.start + len(s.windows)) for s in abstract.segments)
        self._check_divides()

    @cached_property
    def shardings(self) -> tuple[NamedSharding, ...]:
        """Where each leaf lies."""
        return tuple(NamedSharding(self.mesh, spec_of(leaf.axes)) for leaf in self.leaves)

    def _check_divides(self) -> None:
        """Refuse scale blocks that would straddle shards, or be padded before the last one."""
        unpadded = {"heads": self.config.num_heads * self.config.head_dim, "ffn": self.config.ffn_size}
        if self.config.latent is not None:
            unpadded |= self.config.latent.axis_sizes(self.config.num_heads)
        if self.config.moe:
            unpadded["shared_ffn"] = self.config.moe.shared_ffn_size
        for leaf, sharding in zip(self.leaves, self.shardings, strict=True):
            for size, axis, mesh_axis in zip(leaf.shape, leaf.axes, sharding.spec, strict=True):
                true = unpadded.get(axis, size)
                if mesh_axis is not None and self.mesh.size > 1 and (size % self.mesh.size or size != true):
                    raise MeshError(
                        f"{'.'.join(map(str, leaf.path))}: its {true} {axis} cannot be shared out among "
                        f"{self.mesh.size} shards in whole scale blocks: use a smaller tp_size or scales per channel"
                    )

    def decoder(self, weights: Sequence[jax.Array]) -> Decoder:
        """The module with its weights (a shard's, inside `shard_map`)."""
        return nnx.merge(self.graph, jax.tree.unflatten(self._tree, weights))

    @property
    def cache_layout(self) -> CacheLayout:
        """What the cache keeps of a token."""
        return cache_layout(self.config, self.layout.num_kv_heads)

    def cache_arrays(self, shape: CacheShape) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes, dtypes and shardings of the keys, the values and the last tokens."""
        kept = self.cache_layout
        pages = (self.config.num_layers * shape.num_pages, kept.heads, shape.page_size)
        keys, values = (
            jax.ShapeDtypeStruct(
                (*pages, width),
                jnp.dtype(self.numerics.dtype),
                sharding=NamedSharding(self.mesh, spec_of(kept.axes)),
            )
            for width in (kept.key_dim, kept.value_dim)
        )
        last = jax.ShapeDtypeStruct((shape.num_slots + 1,), jnp.int32, sharding=NamedSharding(self.mesh, _REPLICATED))
        return keys, values, last


def _leaf(path: Any, weight: Any) -> Leaf:
    assert isinstance(weight, Weight)
    value = weight.get_value()
    return Leaf(tuple(path), tuple(value.shape), np.dtype(value.dtype), tuple(weight.axes))
