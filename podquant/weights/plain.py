"""Rows of a tensor that is taken as it is on disk, held to be finite."""

from __future__ import annotations

from typing import Any

import numpy as np

from podquant.checkpoint.header import TensorInfo
from podquant.checkpoint.reader import read_rows
from podquant.errors import NonFiniteWeightError
from podquant.quantize.finite import refuse_nonfinite
from podquant.storage.store import Store
from podquant.weights.hostmemory import empty


def read_plain(
    store: Store, info: TensorInfo, start: int, stop: int, *, allow_nonfinite: bool
) -> np.ndarray[Any, np.dtype[Any]]:
    """Rows `[start, stop)` in the tensor's own dtype.

    Raises:
        NonFiniteWeightError: one holds NaN or an infinity, and that is not allowed.
        StorageError: they cannot be read.
    """
    rows = read_rows(store, info, start, stop, empty((stop - start, *info.shape[1:]), info.dtype.numpy))
    if not allow_nonfinite:
        try:
            refuse_nonfinite(rows.reshape(stop - start, -1), start)
        except NonFiniteWeightError as error:
            raise NonFiniteWeightError(f"{store.uri}/{info.file}: {info.name}: {error}") from None
    return rows
