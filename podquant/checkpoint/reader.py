"""Bytes of a checkpoint into NumPy arrays, a range of rows at a time. Knows nothing of what is done with them."""

from __future__ import annotations

import difflib
import math
from typing import Any

import numpy as np

from podquant.checkpoint.header import TensorInfo
from podquant.checkpoint.index import Checkpoint
from podquant.errors import CheckpointError, StorageError
from podquant.storage.store import Store

Array = np.ndarray[Any, np.dtype[Any]]


def read_rows(store: Store, info: TensorInfo, start: int, stop: int, out: Array | None = None) -> Array:
    """Rows `start` to `stop` of a tensor: [stop - start, *shape[1:]] in its own dtype.

    The bytes go from the file straight into `out` (made if not given), which must have that shape and dtype and be
    C-contiguous and writable; it is returned. May be called from several threads at once.
    """
    if not info.shape or not 0 <= start <= stop <= info.shape[0]:
        raise CheckpointError(_at(store, info) + f": no rows [{start}, {stop}) in shape {list(info.shape)}.")
    shape = (stop - start, *info.shape[1:])
    row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
    return _read(store, info, info.offset + start * row_bytes, shape, out)


def read_bytes(store: Store, info: TensorInfo, offset: int, out: Array) -> None:
    """Fill `out` (uint8) from `offset` on in the file of a tensor, which errors name; may run into the next tensors."""
    try:
        store.read_into(info.file, offset, out)
    except StorageError as error:
        raise type(error)(f"tensor {info.name!r}: {error}") from error


def read_whole(store: Store, info: TensorInfo) -> Array:
    """A whole tensor in its own shape and dtype."""
    return _read(store, info, info.offset, info.shape, None)


def read_tensor(checkpoint: Checkpoint, name: str) -> Array:
    """A whole tensor, by its name."""
    info = checkpoint.tensors.get(name)
    if info is None:
        near = difflib.get_close_matches(name, checkpoint.tensors, n=1)
        hint = f" The nearest name is {near[0]!r}." if near else ""
        raise CheckpointError(f"{checkpoint.store.uri}: no tensor {name!r}.{hint}")
    return read_whole(checkpoint.store, info)


def _read(store: Store, info: TensorInfo, offset: int, shape: tuple[int, ...], out: Array | None) -> Array:
    if out is None:
        out = np.empty(shape, info.dtype.numpy)
    elif out.shape != shape or out.dtype != info.dtype.numpy or not out.flags.c_contiguous or not out.flags.writeable:
        raise CheckpointError(
            _at(store, info) + f": cannot read into {out.dtype}{list(out.shape)}: "
            f"expected a writable C-contiguous {info.dtype.name}{list(shape)}."
        )
    read_bytes(store, info, offset, out.reshape(-1).view(np.uint8))
    return out


def _at(store: Store, info: TensorInfo) -> str:
    return f"{store.uri}/{info.file}: tensor {info.name!r}"
