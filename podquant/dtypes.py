"""The element types podquant knows: one table, from the name on disk to range and NumPy type."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class DType:
    """One element type.

    Attributes:
        name: the name in YAML and in Python (`int8`, `float8_e4m3fn`, `bfloat16`).
        disk: the name in a safetensors header (`I8`, `F8_E4M3`, `BF16`).
        numpy: the NumPy (or ml_dtypes) type.
        qmax: the largest magnitude a quantized code takes, for the types weights are quantized to, else None.
    """

    name: str
    disk: str
    numpy: np.dtype
    qmax: float | None = None

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.numpy.itemsize


_TABLE = (
    DType("bfloat16", "BF16", np.dtype(ml_dtypes.bfloat16)),
    DType("float16", "F16", np.dtype(np.float16)),
    DType("float32", "F32", np.dtype(np.float32)),
    DType("float64", "F64", np.dtype(np.float64)),
    DType("int8", "I8", np.dtype(np.int8), qmax=127.0),
    DType("float8_e4m3fn", "F8_E4M3", np.dtype(ml_dtypes.float8_e4m3fn), qmax=448.0),
    DType("float8_e5m2", "F8_E5M2", np.dtype(ml_dtypes.float8_e5m2)),
    DType("float8_e8m0fnu", "F8_E8M0", np.dtype(ml_dtypes.float8_e8m0fnu)),
    DType("uint8", "U8", np.dtype(np.uint8)),
    DType("int16", "I16", np.dtype(np.int16)),
    DType("uint16", "U16", np.dtype(np.uint16)),
    DType("int32", "I32", np.dtype(np.int32)),
    DType("uint32", "U32", np.dtype(np.uint32)),
    DType("int64", "I64", np.dtype(np.int64)),
    DType("uint64", "U64", np.dtype(np.uint64)),
    DType("bool", "BOOL", np.dtype(np.bool_)),
)

BY_NAME = {dtype.name: dtype for dtype in _TABLE}
BY_DISK_NAME = {dtype.disk: dtype for dtype in _TABLE}

SOURCE_DTYPES = ("bfloat16", "float16", "float32", "float64")
"""Names of the types a weight may have to be quantized."""

QUANTIZED_DTYPES = tuple(dtype.name for dtype in _TABLE if dtype.qmax is not None)
"""Names of the types a weight or an activation can be quantized to."""
