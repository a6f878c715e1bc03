"""Weights from a source onto the devices of a mesh, which may belong to several processes.

Every process walks through the same windows and reads of each what its own devices are to read, so that each byte is
read once. Threads read, and quantize where that is asked for, while earlier windows are on their way. A host holds the
windows in flight; the devices hold the arrays the programs take and a window, and never a weight in its original dtype
beside its quantized one. A process that fails to read goes on with zeros until all have heard of it, so that none waits
for another in vain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from itertools import count, groupby, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding

from podquant.artifact.naming import weight_of
from podquant.families.declaration import declare
from podquant.model.layout import Model
from podquant.model.mesh import Exchange, exchange_over
from podquant.weights.agreement import agree, check_files, check_same_weights
from podquant.weights.expert_windows import (
    ExpertWindow,
    expert_windows,
    is_expert,
    place_experts,
    read_part,
)
from podquant.weights.hostmemory import empty
from podquant.weights.placement import place
from podquant.weights.source import WeightSource, check_source
from podquant.weights.windows import (
    LIMITS,
    Limits,
    Stream,
    Window,
    local_devices,
    module_windows,
    modules_of,
)

Array = np.ndarray[Any, np.dtype[Any]]

Blocks = tuple[Array, ...]
"""What a device gets of a window: rows for each leaf of its stream."""

_THREADS = 8
"""That read: a bucket gives each of them some 100 MB/s."""

_MOST_AHEAD = 64
"""Windows ahead, however small they are."""

_FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def load_weights(
    model: Model,
    source: WeightSource,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
    *,
    exchange: Exchange | None = None,
    limits: Limits = LIMITS,
) -> tuple[jax.Array, ...]:
    """Load every weight of a model. All processes of its mesh call this together, each with a source just opened.

    What was read is checked against the checksums that an artifact, or the storage of a checkpoint, has of its files;
    bytes that no weight needs are read for that alone. `source.store.bytes_read` is what this process read in all.

    Args:
        model: laid out over its mesh, with the schemes of `source`.
        source: where the weights come from.
        on_progress: called with the bytes of each window, those that other processes read included.
        exchange: gives every process the bytes of all; None: over the mesh.
        limits: how much is read at a time.

    Returns:
        The arrays in the order of `model.leaves`.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape, or another process has other weights; found before
            anything is read but samples.
        NonFiniteWeightError: a weight to quantize holds NaN or Inf.
        ArtifactError: bytes of an artifact are not those its manifest has a checksum of; names the file.
        StorageError: bytes could not be read, or are not those the storage has a checksum of.
    """
    exchange = exchange or exchange_over(model.mesh)
    check_same_weights(source, exchange)
    check_source(declare(model.config), source)
    modules = list(modules_of(model).values())
    module_of = {leaf: number for number, leaves in enumerate(modules) for leaf in leaves.values()}
    loaded: dict[int, jax.Array] = {}
    with _Reader(model, source, limits) as reader:
        windows = reader.read(_plan(model, source, limits))
        groups = groupby(windows, lambda read: module_of[read.window.stream.leaves[0]])
        for leaves, (_, group) in zip(modules, groups, strict=True):
            _load_module(model, list(leaves.values()), group, loaded, on_progress)
            agree(exchange, reader.failure)
    check_files(source, exchange)
    return tuple(loaded[index] for index in range(len(model.leaves)))


def _plan(model: Model, source: WeightSource, limits: Limits) -> Iterator[Window | ExpertWindow]:
    turns = count()
    for path, leaves in modules_of(model).items():
        if is_expert(path):
            yield from expert_windows(model, source, path, leaves, limits)
        else:
            yield from module_windows(model, source, path, leaves, limits, turns)


@dataclass(frozen=True)
class _Read:
    """A window, and the blocks of this process's devices once they are read."""

    window: Window | ExpertWindow
    blocks: list[Future[Blocks]]
    nbytes: int


def _load_module(
    model: Model,
    leaves: list[int],
    windows: Iterable[_Read],
    loaded: dict[int, jax.Array],
    on_progress: Callable[[int], None],
) -> None:
    """Fill a module's leaves, stacked layers and all; one window is placed while the next is transferred."""
    devices = [model.mesh.devices.flat[d] for d in local_devices(model, jax.process_index())]
    for index in leaves:
        leaf = model.leaves[index]
        loaded[index] = _zeros(leaf.shape, leaf.dtype, model.shardings[index])()
    for read in windows:
        blocks = [future.result() for future in read.blocks]
        for position, index in enumerate(read.window.stream.leaves):
            moved = [jax.device_put(block[position], device) for block, device in zip(blocks, devices, strict=True)]
            jax.block_until_ready([loaded[each] for each in leaves])
            if isinstance(read.window, ExpertWindow):
                loaded[index] = place_experts(model, index, loaded[index], read.window, moved)
            else:
                loaded[index] = place(model, index, loaded[index], read.window, moved)
        on_progress(read.window.nbytes)


@cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any], sharding: NamedSharding) -> Callable[[], jax.Array]:
    """The program that makes an array of zeros where it belongs, compiled once for all arrays alike."""
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)


class _Reader:
    """Threads that read the blocks of this process's devices ahead of their turn; a context manager.

    Attributes:
        failure: the first error; blocks read after it are zeros.
    """

    def __init__(self, model: Model, source: WeightSource, limits: Limits) -> None:
        self._model = model
        self._source = source
        self._limits = limits
        self._devices = local_devices(model, jax.process_index())
        self._alone = len(self._devices) == model.mesh.size
        self._threads = ThreadPoolExecutor(_THREADS, "load")
        self.failure: Exception | None = None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def read(self, windows: Iterable[Window | ExpertWindow]) -> Iterator[_Read]:
        """The windows in order, read as far ahead as the limits allow.

        Raises:
            Exception: reading failed, if there is no other process that has to hear of it first.
        """
        ahead: deque[_Read] = deque()
        held = 0
        for window in windows:
            nbytes = self._held_bytes(window)
            while ahead and (held + nbytes > self._limits.ahead_bytes or len(ahead) == _MOST_AHEAD):
                held -= ahead[0].nbytes
                yield self._next(ahead)
            blocks = [self._threads.submit(self._read, window, device) for device in self._devices]
            ahead.append(_Read(window, blocks, nbytes))
            held += nbytes
        while ahead:
            yield self._next(ahead)

    def _next(self, ahead: deque[_Read]) -> _Read:
        read = ahead.popleft()
        for future in read.blocks:
            future.result()
        if self.failure is not None and self._alone:
            raise self.failure
        return read

    def _held_bytes(self, window: Window | ExpertWindow) -> int:
        """Of host memory: what is read, and what is made of it."""
        size = int(np.prod(window.block_shape))
        widths = [self._model.leaves[index].dtype.itemsize for index in window.stream.leaves[:1]]
        return len(self._devices) * size * (window.stream.itemsize + sum(widths))

    def _read(self, window: Window | ExpertWindow, device: int) -> Blocks:
        if isinstance(window, ExpertWindow):
            return self._read_experts(window, device)
        stream = window.stream
        first, last = window.rows_of(device)
        values: Blocks = ()
        if first < last and self.failure is None:
            try:
                values = _read_rows(self._source, window, device)
            except Exception as error:  # whatever it is, the other processes are told
                self.failure = self.failure or error
        blocks = []
        for position, index in enumerate(stream.leaves):
            dtype = self._model.leaves[index].dtype
            if values and len(values[position]) == window.rows:
                blocks.append(_as_dtype(values[position], dtype))
                continue
            block = np.zeros((window.rows, *self._inner_shape(window, position)), dtype)
            if values:
                block[: len(values[position])] = _as_dtype(values[position], dtype)
            blocks.append(block)
        return tuple(blocks)

    def _read_experts(self, window: ExpertWindow, device: int) -> Blocks:
        dtypes = [self._model.leaves[index].dtype for index in window.stream.leaves]
        blocks = tuple(empty(window.shape_of(i), dtype) for i, dtype in enumerate(dtypes))
        for slot, part in enumerate(window.parts_of(device)):
            values: Blocks = ()
            if part is not None and self.failure is None:
                try:
                    values = read_part(self._source, window.stream, part)
                except Exception as error:
                    self.failure = self.failure or error
            for position, block in enumerate(blocks):
                block[slot] = _as_dtype(values[position], block.dtype) if values else 0
        return blocks

    def _inner_shape(self, window: Window, position: int) -> tuple[int, ...]:
        """Of a row of a block."""
        if position == 0:
            return window.block_shape[1:]
        scheme = self._source.scheme_of(window.stream.module)
        block = scheme.weight_block_size if scheme else None
        return (1 if block is None else -(-window.block_shape[1] // block[1]),)


def _read_rows(source: WeightSource, window: Window, device: int) -> Blocks:
    """A device's rows of the weight, and of the scales if it is quantized while read."""
    stream, columns = window.stream, window.columns_of(device)
    strips = [_read_strip(source, stream, *rows, columns) for rows in stream.strips.ranges(*window.rows_of(device))]
    return strips[0] if len(strips) == 1 else tuple(map(np.concatenate, zip(*strips, strict=True)))


def _read_strip(source: WeightSource, stream: Stream, first: int, last: int, columns: tuple[int, int] | None) -> Blocks:
    """Rows of the tensor, with their own part only of scale blocks that other weights share."""
    above, below = first % stream.step, last % stream.step
    if not above and (not below or last == _num_rows(source, stream)):
        return _read_blocks(source, stream, first, last, columns)
    # Two weights, or two windows, meet inside a scale block: it is read whole for both, and apart from the others.
    start, stop = first - above, min(last - below + stream.step, _num_rows(source, stream)) if below else last
    inner = [start + stream.step if above else start, last - below]
    bounds = sorted({start, *(row for row in inner if start < row < stop), stop})
    parts = []
    for begin, end in pairwise(bounds):
        is_shared = begin < first or end > last
        with source.store.apart() if is_shared else nullcontext():
            parts.append(_read_blocks(source, stream, begin, end, columns))
    return tuple(np.concatenate(arrays)[above : above + last - first] for arrays in zip(*parts, strict=True))


def _read_blocks(
    source: WeightSource, stream: Stream, first: int, last: int, columns: tuple[int, int] | None
) -> Blocks:
    """Rows of whole scale blocks, each row with scales of its own: shards then need no alignment to blocks."""
    if stream.quantizes:
        rows = source.read_quantized(stream.module, first, last)
        return rows.codes, _repeated(rows.scales, stream.step, last - first)
    values = source.read_rows(stream.tensor, first // stream.repeat, -(-last // stream.repeat), columns)
    return (_repeated(values, stream.repeat, last - first),)


def _num_rows(source: WeightSource, stream: Stream) -> int:
    """Rows of the weight; for scales, of the weight they scale."""
    shape = source.shape_of(weight_of(stream.module) if stream.repeat > 1 else stream.tensor)
    assert shape is not None  # it has been looked for before
    return shape[0]


def _repeated(values: Array, times: int, num_rows: int) -> Array:
    return values if times == 1 else np.repeat(values, times, axis=0)[:num_rows]


def _as_dtype(values: Array, dtype: np.dtype[Any]) -> Array:
    if values.dtype == dtype:
        return values
    out = empty(values.shape, dtype)
    if values.dtype == ml_dtypes.float8_e4m3fn:
        return np.take(_FP8_VALUES.astype(dtype), values.view(np.uint8), out=out, mode="clip")
    out[...] = values
    return out
