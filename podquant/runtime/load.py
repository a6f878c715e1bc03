"""Weights from a source onto the devices of a mesh, in row windows.

Each byte is read once. The host holds one window at a time; the devices hold the arrays the programs take and a window,
and never a weight in its original dtype beside its quantized one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding

from podquant.artifact.naming import weight_of
from podquant.model.config import ModelConfig
from podquant.quantize.qarray import QArray
from podquant.runtime.programs import Leaf, Model
from podquant.runtime.source import WeightSource, require

Array = np.ndarray[Any, np.dtype[Any]]

WINDOW_BYTES = 32 << 20
"""Bytes of source rows read at one time."""

_FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@dataclass(frozen=True)
class _Run:
    """Rows that lie one behind the other on disk and on the devices."""

    device: int
    disk: int
    rows: int


class _Buffer:
    """One array of weights while it is being filled: the piece of each device, updated in place."""

    def __init__(self, leaf: Leaf, sharding: NamedSharding) -> None:
        self.leaf = leaf
        self.sharding = sharding
        zeros = _zeros(leaf.shape, leaf.dtype, sharding)()
        self.pieces: dict[jax.Device, tuple[tuple[slice, ...], jax.Array]] = {}
        for shard in zeros.addressable_shards:
            bounds = tuple(slice(*s.indices(n)) for s, n in zip(shard.index, leaf.shape, strict=True))
            self.pieces[shard.device] = (bounds, shard.data)

    def write(self, block: Array, at: tuple[int, ...]) -> None:
        """Place `block`, its first element at global index `at`, onto every device that has a part of it."""
        for device, (bounds, piece) in self.pieces.items():
            wanted = [
                (max(b.start, start), min(b.stop, start + size))
                for b, start, size in zip(bounds, at, block.shape, strict=True)
            ]
            if any(first >= last for first, last in wanted):
                continue
            part = block[tuple(slice(first - s, last - s) for (first, last), s in zip(wanted, at, strict=True))]
            offsets = tuple(np.int32(first - b.start) for (first, _), b in zip(wanted, bounds, strict=True))
            piece = _update(piece, jax.device_put(np.ascontiguousarray(part), device), offsets)
            self.pieces[device] = (bounds, piece)

    def finish(self) -> jax.Array:
        """The whole array."""
        arrays = [piece for _, piece in self.pieces.values()]
        return jax.make_array_from_single_device_arrays(self.leaf.shape, self.sharding, arrays)


@cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any], sharding: NamedSharding) -> Callable[[], jax.Array]:
    """The program that makes an array of zeros where it belongs, compiled once for all arrays alike."""
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@partial(jax.jit, donate_argnums=0)
def _update(piece: jax.Array, block: jax.Array, offsets: tuple[jax.Array, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(piece, block, offsets)


def load_weights(
    model: Model, source: WeightSource, on_progress: Callable[[int], None] = lambda num_bytes: None
) -> tuple[jax.Array, ...]:
    """Load every weight of a model.

    Args:
        model: laid out over its mesh, with the schemes of `source`.
        source: where the weights come from.
        on_progress: called with the bytes of each piece read.

    Returns:
        The arrays in the order of `model.leaves`.

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape; found before anything is read.
        NonFiniteWeightError: quantizing on the way met NaN or Inf.
    """
    modules: dict[tuple[str | int, ...], dict[str, int]] = {}
    for index, leaf in enumerate(model.leaves):
        modules.setdefault(leaf.path[:-1], {})[str(leaf.path[-1])] = index
    for leaf in model.leaves:
        if leaf.path[-1] != "weight_scale":
            for name in _disk_names(model, leaf.path[:-1]):
                require(source, f"{name}.{leaf.path[-1]}", _disk_shape(model.config, leaf))
    loaded: dict[int, jax.Array] = {}
    for path, leaves in modules.items():
        buffers = {name: _Buffer(model.leaves[i], model.shardings[i]) for name, i in leaves.items()}
        for layer, name in enumerate(_disk_names(model, path)):
            _load_module(model, source, name, layer, buffers, on_progress)
        loaded |= {i: buffers[name].finish() for name, i in leaves.items()}
    return tuple(loaded[i] for i in range(len(model.leaves)))


def _load_module(
    model: Model,
    source: WeightSource,
    module: str,
    layer: int,
    buffers: Mapping[str, _Buffer],
    on_progress: Callable[[int], None],
) -> None:
    for name, buffer in buffers.items():
        leaf = buffer.leaf
        stacked = leaf.axes[0] == "layers"
        if len(leaf.axes) - stacked == 1:
            values = source.read_tensor(f"{module}.{name}")
            on_progress(values.nbytes)
            for run in _runs(model, leaf, 0, len(values)):
                block = _as_dtype(values[run.disk : run.disk + run.rows], leaf.dtype)
                buffer.write(block[None] if stacked else block, (layer, run.device) if stacked else (run.device,))
        elif name == "weight":
            for start, window in _windows(source, module):
                on_progress(window.codes.nbytes if isinstance(window, QArray) else window.nbytes)
                _place(model, layer, start, window, buffers)


def _windows(source: WeightSource, module: str) -> Iterator[tuple[int, Array | QArray]]:
    shape = source.shape_of(weight_of(module))
    assert shape is not None  # load_weights has checked
    scheme = source.scheme_of(module)
    step = scheme.weight_block_size[0] if scheme and scheme.weight_block_size else 1
    rows = max(1, WINDOW_BYTES // (2 * shape[1]) // step) * step
    for start in range(0, shape[0], rows):
        yield start, source.read_weight(module, start, min(start + rows, shape[0]))


def _place(model: Model, layer: int, start: int, window: Array | QArray, buffers: Mapping[str, _Buffer]) -> None:
    weight = buffers["weight"]
    stacked = weight.leaf.axes[0] == "layers"
    values = window.codes if isinstance(window, QArray) else window
    blocks = {"weight": values}
    if isinstance(window, QArray):
        scales = window.scales
        if window.block is not None:
            # On the devices every output channel has its own row of scales: shards then need no alignment to blocks.
            scales = np.repeat(scales, window.block[0], axis=0)[: len(values)]
        blocks["weight_scale"] = scales
    for name, block in blocks.items():
        leaf = buffers[name].leaf
        for run in _runs(model, leaf, start, start + len(block)):
            part = _as_dtype(block[run.disk - start : run.disk - start + run.rows], leaf.dtype)
            buffers[name].write(part[None] if stacked else part, (layer, run.device, 0) if stacked else (run.device, 0))


def _as_dtype(values: Array, dtype: np.dtype[Any]) -> Array:
    if values.dtype == dtype:
        return values
    if values.dtype == ml_dtypes.float8_e4m3fn:
        return np.asarray(_FP8_VALUES.astype(dtype)[values.view(np.uint8)])
    return values.astype(dtype)


def _runs(model: Model, leaf: Leaf, start: int, stop: int) -> Iterator[_Run]:
    """Where disk rows [start, stop) go: in place, but for key/value heads of which several shards have a copy."""
    axis = leaf.axes[1] if leaf.axes[0] == "layers" else leaf.axes[0]
    copies = model.layout.num_kv_heads // model.config.num_kv_heads
    if axis != "kv_heads" or copies == 1:
        yield _Run(start, start, stop - start)
        return
    head = model.config.head_dim
    for index in range(model.layout.num_kv_heads):
        disk = index // copies * head
        first, last = max(disk, start), min(disk + head, stop)
        if first < last:
            yield _Run(index * head + first - disk, first, last - first)


def _disk_names(model: Model, path: tuple[str | int, ...]) -> list[str]:
    """The modules on disk that a module of the decoder holds: one, or one for each layer stacked in it."""
    if path[0] == "segments":
        segment = model.segments[int(path[1])]
        rest = ".".join(map(str, path[3:]))
        return [f"model.layers.{layer}.{rest}" for layer in range(*segment)]
    return [{"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}[str(path[0])]]


def _disk_shape(config: ModelConfig, leaf: Leaf) -> tuple[int, ...]:
    """The shape a weight has on disk, from its axes: without padding, copies or stacking."""
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads * config.head_dim,
        "kv_heads": config.num_kv_heads * config.head_dim,
        "ffn": config.ffn_size,
        "head_dim": config.head_dim,
    }
    return tuple(sizes[axis] for axis in leaf.axes if axis != "layers")
