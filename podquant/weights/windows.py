"""Which rows of which tensor each device's process reads, in which order: a plan that every process makes alike.

A window is a block of rows for each device of the mesh. Every byte is in the block of one device; where a device needs
others than those read for it, `runtime.place` moves them between the devices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count

import numpy as np

from podquant.artifact.naming import weight_of
from podquant.families.config import ModelConfig
from podquant.families.disk import Place
from podquant.model.axes import TP
from podquant.model.layout import Leaf, Model
from podquant.weights.source import WeightSource


@dataclass(frozen=True)
class Limits:
    """How much is read and moved at a time.

    Attributes:
        window_bytes: of the blocks of one window that a process reads.
        ahead_bytes: of the blocks that a process has read, or is reading, before their turn.
        gathered_bytes: of a window that every device gets whole.
        whole_bytes: vectors and scales up to this size on a device are read by one process.
        tile_rows: windows begin at multiples of this, where TPUs tile arrays of any element type.
    """

    window_bytes: int = 32 << 20
    ahead_bytes: int = 96 << 20
    gathered_bytes: int = 64 << 20
    whole_bytes: int = 256 << 10
    tile_rows: int = 128


LIMITS = Limits()


class Spread(Enum):
    """What a device's block of a window is.

    OWN_ROWS: rows of its own shard, cut along axis 0. OWN_COLUMNS: rows of its own shard, cut along axis 1, as the
    source is. SPLIT: its share of the window's rows, whole. ONE: the whole tensor for one device, nothing for others.
    """

    OWN_ROWS = auto()
    OWN_COLUMNS = auto()
    SPLIT = auto()
    ONE = auto()


@dataclass(frozen=True)
class Strips:
    """Which rows of a tensor on disk are a weight's: `run` of every `pitch`, from `offset` on."""

    offset: int
    run: int
    pitch: int

    def ranges(self, first: int, last: int) -> list[tuple[int, int]]:
        """Where rows `[first, last)` of the weight are."""
        found = []
        while first < last:
            strip, row = divmod(first, self.run)
            count = min(last - first, self.run - row)
            start = self.offset + strip * self.pitch + row
            found.append((start, start + count))
            first += count
        return found


@dataclass(frozen=True)
class Stream:
    """A tensor on disk, and the leaves its rows fill.

    Attributes:
        module, tensor: their names on disk.
        strips: those of its rows that are wanted, where it holds several of the model's weights.
        leaves: indices into `Model.leaves`: one, or weight and scales of a module that is quantized while it is read.
        layer: where in stacked leaves.
        quantizes: whether it is.
        spread: how its windows are read.
        shape: of what is wanted of it, a row of block scales counting as many times as the block has rows.
        step: rows that are read together.
        repeat: rows that a row on disk stands for.
        shard_rows: rows of a shard, under OWN_ROWS.
        itemsize: bytes of an element on disk.
    """

    module: str
    tensor: str
    strips: Strips
    leaves: tuple[int, ...]
    layer: int
    quantizes: bool
    spread: Spread
    shape: tuple[int, ...]
    step: int
    repeat: int
    shard_rows: int
    itemsize: int


@dataclass(frozen=True)
class Window:
    """A block of rows for each device.

    Attributes:
        stream: of what.
        number: of the window in its stream, from 0.
        stride: rows from one window's first to that of the next.
        rows: of each block; blocks at the end of the tensor are filled up with zeros.
        num_rows: of the blocks joined, without such filling, under SPLIT and ONE.
        owner: the device that reads, under ONE.
        num_devices: of the mesh.
    """

    stream: Stream
    number: int
    stride: int
    rows: int
    num_rows: int
    owner: int
    num_devices: int

    @property
    def row(self) -> int:
        """The first row, of the tensor or (OWN_ROWS) of each shard."""
        return self.number * self.stride

    def rows_of(self, device: int) -> tuple[int, int]:
        """Rows of the weight that are read for a device; the first is not before the last if there are none."""
        first = self.row
        if self.stream.spread is Spread.OWN_ROWS:
            first += device * self.stream.shard_rows
        elif self.stream.spread is Spread.SPLIT:
            first += device * self.rows
        elif self.stream.spread is Spread.ONE and device != self.owner:
            first = self.stream.shape[0]
        return first, min(first + self.rows, self.stream.shape[0])

    def columns_of(self, device: int) -> tuple[int, int] | None:
        """Columns that are read for a device; None for all."""
        if self.stream.spread is not Spread.OWN_COLUMNS:
            return None
        width = self.stream.shape[1] // self.num_devices
        return device * width, (device + 1) * width

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Of a device's block of the tensor, before it is quantized."""
        columns = self.columns_of(0)
        return (self.rows, *(self.stream.shape[1:] if columns is None else (columns[1],)))

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of all devices."""
        total, repeat = 0, self.stream.repeat
        for device in range(self.num_devices):
            for first, last in self.stream.strips.ranges(*self.rows_of(device)):
                # a row of block scales that two weights share is counted with the first
                total += -(-last // repeat) - -(-first // repeat)
        return total * math.prod(self.block_shape[1:]) * self.stream.itemsize


def plan_windows(model: Model, source: WeightSource, limits: Limits) -> Iterator[Window]:
    """All windows of a model, module by module; a stack of layers is one module.

    Args:
        model: laid out over its mesh.
        source: has every tensor, see `disk_shape`.
        limits: how large they may be.
    """
    turns = count()
    for path, leaves in modules_of(model).items():
        yield from module_windows(model, source, path, leaves, limits, turns)


def module_windows(
    model: Model,
    source: WeightSource,
    path: tuple[str | int, ...],
    leaves: dict[str, int],
    limits: Limits,
    turns: Iterator[int],
) -> Iterator[Window]:
    """The windows of one module, and of all layers stacked in it.

    Args:
        path, leaves: an item of `modules_of`.
        turns: counts the tensors, to give those that one process reads whole to each in turn.
    """
    for layer, place in enumerate(disk_places(model, path)):
        for stream in _streams(model, source, place, layer, leaves, limits):
            yield from _windows(model, stream, limits, next(turns))


def modules_of(model: Model) -> dict[tuple[str | int, ...], dict[str, int]]:
    """The modules of a model by path, each with the indices of its leaves by name."""
    modules: dict[tuple[str | int, ...], dict[str, int]] = {}
    for index, leaf in enumerate(model.leaves):
        modules.setdefault(leaf.path[:-1], {})[str(leaf.path[-1])] = index
    return modules


def disk_places(model: Model, path: tuple[str | int, ...]) -> list[Place]:
    """Where on disk a module of the decoder is: in one place, or in one for each layer stacked in it."""
    names = model.config.names
    if path[0] == "segments":
        module = ".".join(map(str, path[3:]))
        return [names.in_layer(layer, module) for layer in range(*model.segments[int(path[1])])]
    return [Place(names.outside(str(path[0])), (str(path[0]),), 0)]


def disk_names(model: Model, path: tuple[str | int, ...]) -> list[str]:
    """The modules on disk that a module of the decoder is in: one, or one for each layer stacked in it."""
    return [place.module for place in disk_places(model, path)]


def _part_rows(model: Model, leaf: Leaf, place: Place) -> list[int]:
    """Rows of each of the weights that are one tensor on disk, of which `leaf` is one; of their codes, if of scales."""
    name = "weight" if leaf.path[-1] == "weight_scale" else leaf.path[-1]
    found = {each.path: each for each in model.leaves}
    paths = [(*leaf.path[:3], *part.split("."), name) for part in place.parts]
    return [disk_shape(model.config, found[path])[0] for path in paths]


def disk_shape(config: ModelConfig, leaf: Leaf) -> tuple[int, ...]:
    """The shape a weight has on disk, from its axes: without padding, copies or stacking."""
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "ffn": config.ffn_size,
        "head_dim": config.head_dim,
        **(config.latent.axis_sizes(config.num_heads) if config.latent else {}),
        "one": 1,
    }
    if config.moe:
        sizes |= {"experts": config.moe.num_experts, "shared_ffn": config.moe.shared_ffn_size}
    return tuple(sizes[axis] for axis in leaf.axes if axis != "layers")


def copies_of(model: Model, leaf: Leaf) -> int:
    """How many devices have a copy of each row of a leaf that is cut along its rows."""
    is_kv = leaf.axes[int(is_stacked(leaf))] == "kv_heads"
    return model.layout.num_kv_heads // model.config.num_kv_heads if is_kv else 1


def cut_axis(model: Model, index: int) -> int | None:
    """The axis, not counting layers, along which a leaf is cut; None if every device has all of it."""
    spec = model.shardings[index].spec[int(is_stacked(model.leaves[index])) :]
    return spec.index(TP) if TP in spec else None


def is_stacked(leaf: Leaf) -> bool:
    """Whether the first axis is that of the layers."""
    return leaf.axes[0] == "layers"


def _streams(
    model: Model, source: WeightSource, place: Place, layer: int, leaves: dict[str, int], limits: Limits
) -> Iterator[Stream]:
    module = place.module
    quantizes = source.quantizes(module)
    scheme = source.scheme_of(module)
    block_rows = scheme.weight_block_size[0] if scheme and scheme.weight_block_size else 1
    for name, index in leaves.items():
        is_scale = name == "weight_scale"
        if is_scale and quantizes:
            continue
        together = (index, leaves["weight_scale"]) if quantizes and name == "weight" else (index,)
        tensor = f"{module}.{name}"
        shape = source.shape_of(tensor)
        assert shape is not None  # the caller has checked
        if is_scale:
            weight = source.shape_of(weight_of(module))
            assert weight is not None
            shape = (weight[0], *shape[1:])
        strips = Strips(0, shape[0], shape[0])
        if len(place.parts) > 1:
            rows = _part_rows(model, model.leaves[index], place)
            shape = (rows[place.part], *shape[1:])
            count = model.config.num_kv_heads if place.by_head else 1
            strips = Strips(sum(rows[: place.part]) // count, shape[0] // count, sum(rows) // count)
        step = block_rows if is_scale or len(together) == 2 else 1
        size = math.prod(shape) * max(source.itemsize_of(tensor), model.leaves[index].dtype.itemsize)
        # What is small and no matrix of weights: a request to storage and a collective cost more than its bytes.
        small = (is_scale or len(shape) == 1) and size <= limits.whole_bytes
        spread = Spread.ONE if small and model.mesh.size > 1 else _spread(model, source, index, tensor, shape, step)
        yield Stream(
            module=module,
            tensor=tensor,
            strips=strips,
            leaves=together,
            layer=layer,
            quantizes=len(together) == 2,
            spread=spread,
            shape=shape,
            step=step,
            repeat=step if is_scale else 1,
            shard_rows=model.leaves[index].shape[int(is_stacked(model.leaves[index]))] // model.mesh.size,
            itemsize=source.itemsize_of(tensor),
        )


def _spread(model: Model, source: WeightSource, index: int, tensor: str, shape: tuple[int, ...], step: int) -> Spread:
    leaf, size = model.leaves[index], model.mesh.size
    if size == 1:
        return Spread.OWN_ROWS
    axis = cut_axis(model, index)
    if axis == 0:
        whole_blocks = leaf.shape[int(is_stacked(leaf))] // size % step == 0
        return Spread.OWN_ROWS if whole_blocks and copies_of(model, leaf) == 1 else Spread.SPLIT
    if axis == 1 and shape[1] % size == 0:
        bounds = {device * (shape[1] // size) for device in range(size)}
        if bounds <= set(source.column_bounds(tensor)):
            return Spread.OWN_COLUMNS
    return Spread.SPLIT


def _windows(model: Model, stream: Stream, limits: Limits, turn: int) -> Iterator[Window]:
    size = model.mesh.size
    if stream.spread is Spread.ONE:
        rows = stream.shape[0]
        yield Window(stream, 0, rows, rows, rows, turn % size, size)
        return
    share = size if stream.spread is Spread.SPLIT else 1
    extent = stream.shard_rows if stream.spread is Spread.OWN_ROWS else stream.shape[0]
    most = _most_rows(model, stream, limits)
    count = -(-extent // (share * most))
    step = stream.step if count == 1 else math.lcm(stream.step, limits.tile_rows)
    rows = _up(-(-extent // (count * share)), step)
    for number, row in enumerate(range(0, extent, rows * share)):
        left = extent - row
        block = min(rows, _up(-(-left // share), stream.step) if share > 1 else left)
        yield Window(stream, number, rows * share, block, min(left, block * share), 0, size)


def _most_rows(model: Model, stream: Stream, limits: Limits) -> int:
    """Rows a block may have: whole tiles and whole scale blocks."""
    size = model.mesh.size
    processes = Counter(device.process_index for device in model.mesh.devices.flat)
    columns = math.prod(stream.shape[1:])
    if stream.spread is Spread.OWN_COLUMNS:
        columns //= size
    widest = max(stream.itemsize, *(model.leaves[index].dtype.itemsize for index in stream.leaves[:1]))
    most = limits.window_bytes // (max(processes.values()) * columns * widest)
    if stream.spread is Spread.SPLIT and cut_axis(model, stream.leaves[0]) != 1:
        most = min(most, limits.gathered_bytes // (size * columns * widest))
    step = math.lcm(stream.step, limits.tile_rows)
    return max(step, most // step * step)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def local_devices(model: Model, process: int) -> list[int]:
    """The positions in the mesh of a process's devices."""
    return [int(i) for i in np.flatnonzero([d.process_index == process for d in model.mesh.devices.flat])]
