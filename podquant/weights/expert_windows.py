"""Routed experts, one tensor each on disk, into the stacked leaves of a mesh; each byte is read by one process.

A window is a block for each device. Where experts are small, every device of a group reads whole experts of its group,
and the devices then exchange parts of them; where they are large and cut along their rows, every device reads its own
rows. Which it is follows from the sizes alone, so that every process makes the same plan.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from podquant.artifact.naming import weight_of
from podquant.families.config import MoEConfig
from podquant.model.axes import TP
from podquant.model.layout import Model
from podquant.model.moe import expert_names
from podquant.weights.source import WeightSource
from podquant.weights.windows import Limits

Array = np.ndarray[Any, np.dtype[Any]]
Path = tuple[str | int, ...]

_BY_DEVICE = PartitionSpec(TP)


@dataclass(frozen=True)
class ExpertStream:
    """One projection of a layer's experts, codes and scales together if it is quantized while it is read.

    Attributes:
        modules: of each expert, on disk.
        name: of the tensors: `weight` or `weight_scale`.
        leaves: indices into `Model.leaves`.
        layer: where in the stack.
        quantizes: whether it is quantized while it is read.
        shape: of an expert's tensor, with the rows the leaf has: a row of block scales stands for many.
        scale_columns: of the scales that quantizing gives.
        step: rows that are read together.
        repeat: rows that a row on disk stands for.
        itemsize: bytes of an element on disk.
        cut: the axis that is shared out among the devices of a group; None for none (it is the same on all).
        group: devices in a group.
        experts: of a group.
    """

    modules: tuple[str, ...]
    name: str
    leaves: tuple[int, ...]
    layer: int
    quantizes: bool
    shape: tuple[int, int]
    scale_columns: int
    step: int
    repeat: int
    itemsize: int
    cut: int | None
    group: int
    experts: int


@dataclass(frozen=True)
class Part:
    """Rows `[first, last)` of one expert."""

    module: str
    first: int
    last: int


@dataclass(frozen=True)
class ExpertWindow:
    """A block for each device: rows of some experts of its group.

    Attributes:
        stream: of what.
        own_rows: every device reads its own rows of the same experts; else whole rows of different ones.
        slot: the first expert, counted in the group.
        count: experts in a block.
        number, stride, rows: the rows from number * stride on, of the expert or (own_rows) of a device's part.
        num_devices: of the mesh.
    """

    stream: ExpertStream
    own_rows: bool
    slot: int
    count: int
    number: int
    stride: int
    rows: int
    num_devices: int

    @property
    def num_experts(self) -> int:
        """Experts of a group that it fills."""
        return min(self.count * (1 if self.own_rows else self.stream.group), self.stream.experts - self.slot)

    def parts_of(self, device: int) -> list[Part | None]:
        """What is read for a device, a part for each place of its block; None where there is no such expert."""
        stream = self.stream
        group, rank = divmod(device, stream.group)
        first = self.number * self.stride
        if self.own_rows:
            first += rank * (stream.shape[0] // stream.group)
        start = self.slot + (0 if self.own_rows else rank * self.count)
        parts: list[Part | None] = []
        for slot in range(start, start + self.count):
            module = stream.modules[group * stream.experts + slot] if slot < stream.experts else None
            parts.append(None if module is None else Part(module, first, first + self.rows))
        return parts

    def shape_of(self, position: int) -> tuple[int, int, int]:
        """Of a device's block, of codes or values (0) or of scales that come with them."""
        return self.count, self.rows, self.stream.shape[1] if position == 0 else self.stream.scale_columns

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Of a device's block of the tensor, before it is quantized."""
        return self.shape_of(0)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of all devices."""
        parts = [part for device in range(self.num_devices) for part in self.parts_of(device) if part is not None]
        rows = sum(-(-part.last // self.stream.repeat) - part.first // self.stream.repeat for part in parts)
        return rows * self.stream.shape[1] * self.stream.itemsize


def is_expert(path: Path) -> bool:
    """Whether a leaf, or a module, is a projection of routed experts."""
    return "experts" in path


def expert_windows(
    model: Model, source: WeightSource, path: Path, leaves: dict[str, int], limits: Limits
) -> Iterator[ExpertWindow]:
    """All windows of one projection, layer by layer.

    Args:
        path, leaves: the module and its leaves by name.
    """
    for layer, index in enumerate(range(*model.segments[int(path[1])])):
        modules = _modules(model, path, index)
        quantizes = source.quantizes(modules[0])
        for name in leaves:
            if name == "weight" or not quantizes:
                yield from _windows(model, _stream(model, source, modules, layer, leaves, name), limits)


def _moe(model: Model) -> MoEConfig:
    assert model.config.moe is not None  # else no path has experts
    return model.config.moe


def _modules(model: Model, path: Path, layer: int) -> tuple[str, ...]:
    name = ".".join(map(str, path[3:]))
    names = expert_names(name, _moe(model).num_experts)
    return tuple(model.config.names.in_layer(layer, each).module for each in names)


def _stream(
    model: Model, source: WeightSource, modules: tuple[str, ...], layer: int, leaves: dict[str, int], name: str
) -> ExpertStream:
    quantizes = source.quantizes(modules[0])
    scheme = source.scheme_of(modules[0])
    block = scheme.weight_block_size if scheme else None
    rows, columns = _shape(source, weight_of(modules[0]))
    is_scale = name == "weight_scale"
    leaf = model.leaves[leaves["weight"]]
    cut: int | None = leaf.axes.index("local_ffn") - 3
    if is_scale:
        columns = _shape(source, f"{modules[0]}.{name}")[1]
        if cut == 1 and columns == 1:
            cut = None
    return ExpertStream(
        modules=modules,
        name=name,
        leaves=(leaves[name], leaves["weight_scale"]) if quantizes else (leaves[name],),
        layer=layer,
        quantizes=quantizes,
        shape=(rows, columns),
        scale_columns=1 if block is None else -(-columns // block[1]),
        step=block[0] if block is not None and (quantizes or is_scale) else 1,
        repeat=block[0] if block is not None and is_scale else 1,
        itemsize=source.itemsize_of(f"{modules[0]}.{name}"),
        cut=cut,
        group=model.layout.tp_size // model.layout.ep_size,
        experts=_moe(model).num_experts // model.layout.ep_size,
    )


def _shape(source: WeightSource, tensor: str) -> tuple[int, int]:
    shape = source.shape_of(tensor)
    assert shape is not None  # the caller has checked
    return shape[0], shape[1]


def _windows(model: Model, stream: ExpertStream, limits: Limits) -> Iterator[ExpertWindow]:
    processes = Counter(device.process_index for device in model.mesh.devices.flat)
    widest = max(stream.itemsize, model.leaves[stream.leaves[0]].dtype.itemsize)
    row_bytes = max(processes.values()) * stream.shape[1] * widest
    most = limits.window_bytes // row_bytes
    share = stream.group if stream.cut == 0 else 1
    step = math.lcm(stream.step, limits.tile_rows)
    # Rows of different experts, of which each device keeps some, cannot be read in part.
    own_rows = share > 1 and stream.shape[0] > most and stream.shape[0] // share % stream.step == 0
    extent = stream.shape[0] // share if own_rows else stream.shape[0]
    rows = extent if extent <= most or (share > 1 and not own_rows) else max(step, most // step * step)
    slots = 1 if own_rows else stream.group
    count = max(1, min(most // extent, -(-stream.experts // slots))) if rows == extent else 1
    for slot in range(0, stream.experts, count * slots):
        for number, row in enumerate(range(0, extent, rows)):
            block = min(rows, extent - row)
            yield ExpertWindow(stream, own_rows, slot, count, number, rows, block, model.mesh.size)


def read_part(source: WeightSource, stream: ExpertStream, part: Part) -> tuple[Array, ...]:
    """Rows of an expert, and of its scales if it is quantized while read: as the leaves have them."""
    if stream.quantizes:
        rows = source.read_quantized(part.module, part.first, part.last)
        return rows.codes, _repeated(rows.scales, stream.step, part.last - part.first)
    values = source.read_rows(
        f"{part.module}.{stream.name}", part.first // stream.repeat, -(-part.last // stream.repeat)
    )
    return (_repeated(values, stream.repeat, part.last - part.first, part.first % stream.repeat),)


def _repeated(values: Array, times: int, num_rows: int, skip: int = 0) -> Array:
    return values if times == 1 else np.repeat(values, times, axis=0)[skip : skip + num_rows]


def place_experts(
    model: Model, index: int, weights: jax.Array, window: ExpertWindow, blocks: list[jax.Array]
) -> jax.Array:
    """Put a window into a leaf; every process calls this, in the same order.

    Args:
        model: laid out over its mesh.
        index: of the leaf.
        weights: the leaf so far; donated.
        window: says where.
        blocks: what was read for the devices of this process, on them, in the order of the mesh.
    """
    shape = (model.mesh.size * blocks[0].shape[0], *blocks[0].shape[1:])
    joined = jax.make_array_from_single_device_arrays(shape, NamedSharding(model.mesh, _BY_DEVICE), blocks)
    at = np.array([window.stream.layer, window.slot, window.number], np.int32)
    placed: jax.Array = placing(model, index, window)(weights, joined, at)
    return placed


def placing(model: Model, index: int, window: ExpertWindow) -> Callable[..., Any]:
    """The compiled-on-demand program of a window: (leaf, blocks joined along axis 0, int32 [3]) to the leaf.

    The three numbers are layer, expert in the group and number of the rows. Windows alike share one.
    """
    leaf, stream = model.leaves[index], window.stream
    cut = stream.cut
    if index != stream.leaves[0] and leaf.axes[-1] == "one" and cut == 1:
        cut = None  # one scale for a row that is cut: the same on all devices of a group
    exchange = None if window.own_rows or stream.group == 1 else (stream.group, cut)
    return _placing(model.mesh, model.shardings[index].spec, exchange, window.stride, window.num_experts)


@cache
def _placing(
    mesh: Mesh, spec: PartitionSpec, exchange: tuple[int, int | None] | None, stride: int, num_experts: int
) -> Callable[..., Any]:
    placed = partial(_place, mesh.size, exchange, stride, num_experts)
    mapped = jax.shard_map(
        placed, mesh=mesh, in_specs=(spec, _BY_DEVICE, PartitionSpec()), out_specs=spec, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=0)


def _place(
    size: int,
    exchange: tuple[int, int | None] | None,
    stride: int,
    num_experts: int,
    weights: jax.Array,
    block: jax.Array,
    at: jax.Array,
) -> jax.Array:
    """On one shard: weights [layers, 1, experts, out, in], block [count, rows, columns]."""
    if exchange is not None:
        group, cut = exchange
        groups = np.arange(size).reshape(-1, group).tolist()
        if cut is None:
            block = jax.lax.all_gather(block, TP, axis_index_groups=groups, tiled=True)
        else:
            block = jax.lax.all_to_all(
                block, TP, split_axis=1 + cut, concat_axis=0, axis_index_groups=groups, tiled=True
            )
    block = block[:num_experts]
    zero = jnp.int32(0)
    # The compiler must see that the first row is a multiple of the tile's rows, see `place`.
    start = (at[0], zero, at[1], at[2] * stride, zero)
    return jax.lax.dynamic_update_slice(weights, block.reshape(1, 1, *block.shape), start)
