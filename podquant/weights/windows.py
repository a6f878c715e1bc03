"""Which rows of which tensors each device's process reads, in which order: a plan that every process makes alike.

A window is a block for each device of the mesh: rows of one tensor, or of some routed experts. Every byte is in the
block of one device; where a device needs others than those read for it, `placement` moves them between the devices.
What is read follows from what is declared and from sizes alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count

import ml_dtypes
import numpy as np

from podquant.families.declaration import Rows
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

REBIASED = 16.0
"""How many times the value of a float8_e4m3fn code is that of the same bits as float8_e4m3b11fnuz."""


class Spread(Enum):
    """What a device's block of a window is.

    OWN_ROWS: rows of its own shard, cut along axis 0. OWN_COLUMNS: rows of its own shard, cut along axis 1, as the
    source is. SPLIT: its share of the window's rows, whole. EXPERTS: its share of the experts of its group, rows and
    all. ONE: the whole tensor for one device, nothing for others.
    """

    OWN_ROWS = auto()
    OWN_COLUMNS = auto()
    SPLIT = auto()
    EXPERTS = auto()
    ONE = auto()


@dataclass(frozen=True)
class Stream:
    """What fills one layer of a leaf: a tensor on disk, or one for each routed expert; of scales, as of codes.

    Attributes:
        name: of the tensors, below the names of modules.
        places: where the rows of each expert are; a weight that is no expert's is the only one.
        leaves: indices into `Model.leaves`: one, or weight and scales of a module that is quantized while it is read.
        layer: where in stacked leaves.
        spread: how its windows are read.
        shape: of an expert's, a row of block scales counting as many times as the block has rows.
        scale_columns: of the scales, those that quantizing gives too, as they lie on the devices.
        scale_blocks: which column on disk each of these is; None: in order.
        scale_factor: what they are multiplied by, where codes are held as a sixteenth of what they are on disk.
        step: rows that are read together.
        repeat: rows that a row on disk stands for.
        shard_rows: rows of a shard, where they are shared out.
        itemsize: bytes of an element on disk.
        group: devices that share out an expert, side by side in the mesh.
        experts: of such a group.
    """

    name: str
    places: tuple[Rows, ...]
    leaves: tuple[int, ...]
    layer: int
    spread: Spread
    shape: tuple[int, ...]
    scale_columns: int
    scale_blocks: tuple[int, ...] | None
    scale_factor: float
    step: int
    repeat: int
    shard_rows: int
    itemsize: int
    group: int
    experts: int

    @property
    def quantizes(self) -> bool:
        """Whether it is quantized while it is read."""
        return len(self.leaves) > 1


@dataclass(frozen=True)
class Part:
    """Rows `[first, last)` of a weight."""

    place: Rows
    first: int
    last: int


@dataclass(frozen=True)
class Window:
    """A block for each device: rows of an expert, or of several.

    Attributes:
        stream: of what.
        slot: the first expert, counted in its group.
        count: experts in a block.
        number: of the rows, from 0.
        stride: from one number's first row to that of the next.
        rows: of each block; blocks at the end of the tensor are filled up with zeros.
        num_rows: of the blocks joined, without such filling, under SPLIT and ONE.
        owner: the device that reads, under ONE.
        num_devices: of the mesh.
    """

    stream: Stream
    slot: int
    count: int
    number: int
    stride: int
    rows: int
    num_rows: int
    owner: int
    num_devices: int

    @property
    def num_experts(self) -> int:
        """Experts of a group that it fills."""
        share = self.stream.group if self.stream.spread is Spread.EXPERTS else 1
        return min(self.count * share, self.stream.experts - self.slot)

    def parts_of(self, device: int) -> list[Part | None]:
        """What is read for a device, a part for each place of its block; None where there are no such rows."""
        stream = self.stream
        group, rank = divmod(device, stream.group)
        first, slot = self.number * self.stride, self.slot
        if stream.spread is Spread.OWN_ROWS:
            first += rank * stream.shard_rows
        elif stream.spread is Spread.SPLIT:
            first += rank * self.rows
        elif stream.spread is Spread.EXPERTS:
            slot += rank * self.count
        last = min(first + self.rows, stream.shape[0])
        if first >= last or (stream.spread is Spread.ONE and device != self.owner):
            return [None] * self.count
        places = stream.places[group * stream.experts :][: stream.experts]
        found: list[Part | None] = [Part(place, first, last) for place in places[slot : slot + self.count]]
        return found + [None] * (self.count - len(found))

    def columns_of(self, device: int) -> tuple[int, int] | None:
        """Columns that are read for a device; None for all."""
        if self.stream.spread is not Spread.OWN_COLUMNS:
            return None
        width = self.stream.shape[1] // self.num_devices
        return device * width, (device + 1) * width

    def shape_of(self, position: int) -> tuple[int, ...]:
        """Of a device's block, [experts, rows, ...]: of the first of the stream's leaves, or of scales with them."""
        stream = self.stream
        if position > 0 or (stream.scale_blocks is not None and not stream.quantizes):
            return self.count, self.rows, stream.scale_columns
        return (self.count, self.rows, *self._columns_on_disk)

    @property
    def _columns_on_disk(self) -> tuple[int, ...]:
        columns = self.columns_of(0)
        return self.stream.shape[1:] if columns is None else (columns[1],)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of all devices."""
        rows, repeat = 0, self.stream.repeat
        for device in range(self.num_devices):
            for part in filter(None, self.parts_of(device)):
                for first, last in part.place.ranges(part.first, part.last):
                    # a row of block scales that two weights share is counted with the first
                    rows += -(-last // repeat) - -(-first // repeat)
        return rows * math.prod(self._columns_on_disk) * self.stream.itemsize


def plan_windows(model: Model, source: WeightSource, limits: Limits) -> Iterator[Window]:
    """All windows of a model, module by module; a stack of layers is one module.

    Args:
        model: laid out over its mesh.
        source: has every weight, see `source.check_source`.
        limits: how large they may be.
    """
    turns = count()  # to give the tensors that one process reads whole to each in turn
    for leaves in model.modules:
        num_layers = len(model.leaves[leaves["weight"]].weights)
        for layer in range(num_layers):
            for name, index in leaves.items():
                module = model.leaves[index].weights[layer].places[0].module
                if name != "weight_scale" or not source.quantizes(module):
                    stream = _stream(model, source, leaves, name, layer, limits)
                    windows = _expert_windows if model.leaves[index].is_experts else _row_windows
                    yield from windows(model, stream, limits, next(turns))


def _stream(
    model: Model, source: WeightSource, leaves: Mapping[str, int], name: str, layer: int, limits: Limits
) -> Stream:
    leaf = model.leaves[leaves[name]]
    weight = leaf.weights[layer]
    module = weight.places[0].module
    scheme = source.scheme_of(module)
    block = scheme.weight_block_size if scheme else None
    is_scale, quantizes = name == "weight_scale", name == "weight" and source.quantizes(module)
    tensor = f"{module}.{name}"
    shape = (weight.shape[0], *source.tensors[tensor].shape[1:])
    step = block[0] if block is not None and (is_scale or quantizes) else 1
    columns, scale_blocks = 1 if block is None else -(-weight.shape[-1] // block[1]), None
    if is_scale or quantizes:
        taken = model.leaves[leaves["weight_scale"]].blocks
        scale_blocks = None if taken == tuple(range(columns)) else taken
    itemsize = source.itemsize_of(tensor)
    return Stream(
        name=name,
        places=weight.places,
        leaves=(leaves[name], leaves["weight_scale"]) if quantizes else (leaves[name],),
        layer=layer,
        spread=_spread(model, source, leaf, tensor, shape, step, limits, in_order=scale_blocks is None),
        shape=shape,
        scale_columns=columns if scale_blocks is None else len(scale_blocks),
        scale_blocks=scale_blocks,
        scale_factor=REBIASED if model.leaves[leaves["weight"]].dtype == ml_dtypes.float8_e4m3b11fnuz else 1.0,
        step=step,
        repeat=step if is_scale else 1,
        shard_rows=leaf.shard_rows,
        itemsize=itemsize,
        group=leaf.shards,
        experts=len(weight.places) * leaf.shards // model.mesh.size if leaf.is_experts else 1,
    )


def _spread(
    model: Model,
    source: WeightSource,
    leaf: Leaf,
    tensor: str,
    shape: tuple[int, ...],
    step: int,
    limits: Limits,
    *,
    in_order: bool,
) -> Spread:
    size, widest = model.mesh.size, max(source.itemsize_of(tensor), leaf.dtype.itemsize)
    whole_blocks = leaf.cut == 0 and leaf.shard_rows % step == 0
    if leaf.is_experts:
        # Rows of different experts, of which each device keeps some, cannot be read in part.
        large = shape[0] > limits.window_bytes // (_most_devices(model) * shape[1] * widest)
        return Spread.OWN_ROWS if large and whole_blocks and leaf.shards > 1 else Spread.EXPERTS
    if size == 1:
        return Spread.OWN_ROWS
    # What is small and no matrix of weights: a request to storage and a collective cost more than its bytes.
    if (leaf.name == "weight_scale" or len(shape) == 1) and math.prod(shape) * widest <= limits.whole_bytes:
        return Spread.ONE
    if whole_blocks and leaf.copies == 1:
        return Spread.OWN_ROWS
    if leaf.cut == 1 and in_order and shape[1] % size == 0:
        bounds = {device * (shape[1] // size) for device in range(size)}
        if bounds <= set(source.column_bounds(tensor)):
            return Spread.OWN_COLUMNS
    return Spread.SPLIT


def _row_windows(model: Model, stream: Stream, limits: Limits, turn: int) -> Iterator[Window]:
    size = model.mesh.size
    if stream.spread is Spread.ONE:
        rows = stream.shape[0]
        yield Window(stream, 0, 1, 0, rows, rows, rows, turn % size, size)
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
        yield Window(stream, 0, 1, number, rows * share, block, min(left, block * share), 0, size)


def _expert_windows(model: Model, stream: Stream, limits: Limits, turn: int) -> Iterator[Window]:
    leaf = model.leaves[stream.leaves[0]]
    own_rows = stream.spread is Spread.OWN_ROWS
    widest = max(stream.itemsize, leaf.dtype.itemsize)
    most = limits.window_bytes // (_most_devices(model) * stream.shape[1] * widest)
    extent = stream.shard_rows if own_rows else stream.shape[0]
    step = math.lcm(stream.step, limits.tile_rows)
    in_parts = own_rows or leaf.cut != 0 or stream.group == 1
    rows = max(step, most // step * step) if in_parts and extent > most else extent
    slots = 1 if own_rows else stream.group
    count = max(1, min(most // extent, -(-stream.experts // slots))) if rows == extent else 1
    for slot in range(0, stream.experts, count * slots):
        for number, row in enumerate(range(0, extent, rows)):
            block = min(rows, extent - row)
            yield Window(stream, slot, count, number, rows, block, block, 0, model.mesh.size)


def _most_rows(model: Model, stream: Stream, limits: Limits) -> int:
    """Rows a block may have: whole tiles and whole scale blocks."""
    size, leaf = model.mesh.size, model.leaves[stream.leaves[0]]
    columns = math.prod(stream.shape[1:])
    if stream.spread is Spread.OWN_COLUMNS:
        columns //= size
    widest = max(stream.itemsize, leaf.dtype.itemsize)
    most = limits.window_bytes // (_most_devices(model) * columns * widest)
    if stream.spread is Spread.SPLIT and leaf.cut != 1:
        most = min(most, limits.gathered_bytes // (size * columns * widest))
    step = math.lcm(stream.step, limits.tile_rows)
    return max(step, most // step * step)


def _most_devices(model: Model) -> int:
    """Of a process."""
    return max(Counter(device.process_index for device in model.mesh.devices.flat).values())


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def local_devices(model: Model, process: int) -> list[int]:
    """The positions in the mesh of a process's devices."""
    return [int(i) for i in np.flatnonzero([d.process_index == process for d in model.mesh.devices.flat])]
