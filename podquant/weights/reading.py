"""A device's block of a window: the rows that it wants out of tensors, their scales with them, in the leaves' types.

Knows nothing of devices or of the order of windows.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np

from podquant.artifact.naming import weight_of
from podquant.errors import CheckpointError
from podquant.weights.hostmemory import empty
from podquant.weights.source import WeightSource
from podquant.weights.windows import REBIASED, Part, Stream, Window

Array = np.ndarray[Any, np.dtype[Any]]

Blocks = tuple[Array, ...]
"""What a device gets of a window: [experts, rows, ...] for each leaf of its stream."""

_FP8_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def read_block(source: WeightSource, window: Window, device: int, dtypes: list[np.dtype[Any]]) -> Blocks:
    """Read a device's block; zeros where there is nothing to read.

    Args:
        device: its position in the mesh.
        dtypes: of the stream's leaves.

    Raises:
        NonFiniteWeightError: a weight to quantize holds NaN or Inf.
        StorageError, ArtifactError, CheckpointError: bytes could not be read, or scales are not finite.
    """
    parts, columns = window.parts_of(device), window.columns_of(device)
    if len(parts) == 1 and parts[0] is not None and parts[0].last - parts[0].first == window.rows:
        whole = _read_part(source, window.stream, parts[0], columns)
        return tuple(as_dtype(values, dtype)[None] for values, dtype in zip(whole, dtypes, strict=True))
    blocks = tuple(empty(window.shape_of(position), dtype) for position, dtype in enumerate(dtypes))
    for slot, part in enumerate(parts):
        num_rows = 0 if part is None else part.last - part.first
        rows = () if part is None else _read_part(source, window.stream, part, columns)
        for block, values in zip(blocks, rows, strict=False):
            block[slot, :num_rows] = as_dtype(values, block.dtype)
        for block in blocks:
            block[slot, num_rows:] = 0
    return blocks


def _read_part(source: WeightSource, stream: Stream, part: Part, columns: tuple[int, int] | None) -> Blocks:
    """Rows of a weight, and of its scales if it is quantized while read."""
    module = part.place.module
    strips = [_read_strip(source, stream, module, *rows, columns) for rows in part.place.ranges(part.first, part.last)]
    return strips[0] if len(strips) == 1 else tuple(map(np.concatenate, zip(*strips, strict=True)))


def _read_strip(
    source: WeightSource, stream: Stream, module: str, first: int, last: int, columns: tuple[int, int] | None
) -> Blocks:
    """Rows of the tensor, with their own part only of scale blocks that other weights share."""
    above, below = first % stream.step, last % stream.step
    num_rows = _num_rows(source, stream, module)
    if not above and (not below or last == num_rows):
        return _read_rows(source, stream, module, first, last, columns)
    # Two weights, or two windows, meet inside a scale block: it is read whole for both, and apart from the others.
    start, stop = first - above, min(last - below + stream.step, num_rows) if below else last
    inner = [start + stream.step if above else start, last - below]
    bounds = sorted({start, *(row for row in inner if start < row < stop), stop})
    parts = []
    for begin, end in pairwise(bounds):
        is_shared = begin < first or end > last
        with source.store.apart() if is_shared else nullcontext():
            parts.append(_read_rows(source, stream, module, begin, end, columns))
    return tuple(np.concatenate(arrays)[above : above + last - first] for arrays in zip(*parts, strict=True))


def _read_rows(
    source: WeightSource, stream: Stream, module: str, first: int, last: int, columns: tuple[int, int] | None
) -> Blocks:
    """Rows of whole scale blocks, each row with scales of its own: shards then need no alignment to blocks."""
    if stream.quantizes:
        rows = source.read_quantized(module, first, last)
        return rows.codes, _laid_out(rows.scales, stream, last - first, module)
    tensor = f"{module}.{stream.name}"
    values = source.read_rows(tensor, first // stream.repeat, -(-last // stream.repeat), columns)
    return (_laid_out(values, stream, last - first, module) if stream.name == "weight_scale" else values,)


def _num_rows(source: WeightSource, stream: Stream, module: str) -> int:
    """Rows of the tensor; for scales, of the weight they scale."""
    return source.tensors[weight_of(module) if stream.repeat > 1 else f"{module}.{stream.name}"].shape[0]


def _laid_out(scales: Array, stream: Stream, num_rows: int, module: str) -> Array:
    """Scales for each of `num_rows` rows of the weight, and for each shard those of the blocks that it touches."""
    if stream.scale_factor != 1.0:
        scales = scales.astype(np.float32)
        if not (scales < np.finfo(np.float32).max / stream.scale_factor).all():
            raise CheckpointError(
                f"{module}.weight_scale: expected scales below {np.finfo(np.float32).max / stream.scale_factor:.3g}, "
                f"got {scales.max():.3g}: with its codes it gives weights that float32 does not hold. Convert the "
                "original checkpoint again"
            )
        scales = scales * np.float32(stream.scale_factor)
    if stream.scale_blocks is not None:
        scales = scales[:, list(stream.scale_blocks)]
    return scales if stream.step == 1 else np.repeat(scales, stream.step, axis=0)[:num_rows]


def as_dtype(values: Array, dtype: np.dtype[Any]) -> Array:
    """The same values in a type that holds them; of codes to float8_e4m3b11fnuz, the same bits: see `REBIASED`."""
    if values.dtype == dtype:
        return values
    out = empty(values.shape, dtype)
    if values.dtype == ml_dtypes.float8_e4m3fn:
        table = _FP8_VALUES / REBIASED if dtype == ml_dtypes.float8_e4m3b11fnuz else _FP8_VALUES
        return np.take(table.astype(dtype), values.view(np.uint8), out=out, mode="clip")
    out[...] = values
    return out
