"""Weights from a source onto the devices of a mesh, which may belong to several processes.

Every process walks through the same windows and reads of each what its own devices are to read, so that each byte is
read once. Threads read, and quantize where that is asked for, while earlier windows are on their way. A host holds the
windows in flight; the devices hold the arrays the programs take and a window, and never a weight in its original dtype
beside its quantized one. A process that fails to read goes on with zeros until all have heard of it, so that none waits
for another in vain.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from podquant.model.layout import Model
from podquant.model.mesh import Exchange, exchange_over
from podquant.weights.agreement import agree, check_files, check_same_weights, check_unchanged
from podquant.weights.placement import place
from podquant.weights.reading import Blocks, read_block
from podquant.weights.source import WeightSource, require_weights
from podquant.weights.windows import LIMITS, Limits, Window, local_devices, plan_windows

_THREADS = 8
"""That read: a bucket gives each of them some 100 MB/s."""

_MOST_AHEAD = 64
"""Windows ahead, however small they are."""


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
        StorageError: bytes could not be read, are not those the storage has a checksum of, or files have changed.
    """
    exchange = exchange or exchange_over(model.mesh)
    check_same_weights(source, exchange)
    require_weights(model.declaration, source)
    module_of = {leaf: number for number, leaves in enumerate(model.modules) for leaf in leaves.values()}
    loaded: dict[int, jax.Array] = {}
    with _Reader(model, source, limits) as reader:
        windows = reader.read(plan_windows(model, source, limits))
        groups = groupby(windows, lambda read: module_of[read.window.stream.leaves[0]])
        for leaves, (_, group) in zip(model.modules, groups, strict=True):
            _load_module(model, list(leaves.values()), group, loaded, on_progress)
            agree(exchange, reader.failure)
    check_files(source, exchange)
    check_unchanged(source, exchange)
    return tuple(loaded[index] for index in range(len(model.leaves)))


@dataclass(frozen=True)
class _Read:
    """A window, and the blocks of this process's devices once they are read."""

    window: Window
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

    def read(self, windows: Iterable[Window]) -> Iterator[_Read]:
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

    def _held_bytes(self, window: Window) -> int:
        """Of host memory: what is read, and what is made of it."""
        itemsize = self._model.leaves[window.stream.leaves[0]].dtype.itemsize
        return len(self._devices) * math.prod(window.shape_of(0)) * (window.stream.itemsize + itemsize)

    def _read(self, window: Window, device: int) -> Blocks:
        dtypes = [self._model.leaves[index].dtype for index in window.stream.leaves]
        if self.failure is None:
            try:
                return read_block(self._source, window, device, dtypes)
            except Exception as error:  # whatever it is, the other processes are told
                self.failure = self.failure or error
        return tuple(np.zeros(window.shape_of(position), dtype) for position, dtype in enumerate(dtypes))
