"""Weights to codes and scales, on the host, one window of rows at a time. Knows nothing of files, names or devices.

    per channel     s[o]   = max_i |W[o, i]| / qmax                 qmax = 127 (int8), 448 (float8_e4m3fn)
    per block       s[b,c] = max over the block / qmax              the last blocks of a row and column are partial
    int8            q = clip(round_half_even(W / s), -127, 127)
    float8_e4m3fn   q = cast(clip(W / s, -448, 448))                round half to even; -0.0 stays -0.0
    all-zero        s = 1, q = 0
    a maximum so small that max / qmax is not a normal float32: s = the smallest normal float32

All in IEEE float32 whatever the source, a true division: the bytes are fully defined, and do not depend on the
windows, the machine or the number of workers. The kernels release the GIL, so threads scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from podquant.config.scheme import Scheme
from podquant.dtypes import BY_NAME, QUANTIZED_DTYPES, SOURCE_DTYPES
from podquant.errors import NonFiniteWeightError
from podquant.quantize import kernels
from podquant.quantize.qarray import QArray, scales_shape
from podquant.quantize.quality import QualityRows

_KINDS = {"bfloat16": kernels.BFLOAT16, "float16": kernels.FLOAT16, "float32": kernels.FLOAT32}


def quantize_weight(weight: npt.NDArray[Any], scheme: Scheme) -> QArray:
    """Quantize a whole weight `[out, in]`; see `quantize_window`."""
    return quantize_window(weight, scheme, first_row=0, total_rows=len(weight))[0]


def quantize_window(
    window: npt.NDArray[Any],
    scheme: Scheme,
    *,
    first_row: int,
    total_rows: int,
    out: QArray | None = None,
) -> tuple[QArray, QualityRows]:
    """Quantize rows `[first_row, first_row + len(window))` of a weight of `total_rows` rows.

    Bytes and statistics do not depend on the windows. With blocks, a window begins at a multiple of the block's rows,
    and ends at one or at the end of the weight.

    Args:
        window: bfloat16, float16, float32, or float64 (rounded to float32 first), `[rows, in]`, all the columns of
            those rows. May be read-only; copied if it is not C-contiguous.
        scheme: the type of the codes and what shares a scale.
        first_row: where the window begins in the weight; errors name rows of the weight.
        total_rows: the rows of the whole weight.
        out: C-contiguous buffers to write, e.g. `QArray.empty(...).window(...)`; fresh ones if None.

    Raises:
        NonFiniteWeightError: a weight is NaN or Inf; the message names row and column, the caller adds tensor and file.
            The content of `out` is then unspecified.
        ValueError: a type, shape or alignment that is the caller's mistake.
    """
    block = _check(window, scheme, first_row, total_rows)
    if window.dtype == np.float64:
        window = _rounded(window)
    if out is None:
        out = QArray.empty((window.shape[0], window.shape[1]), scheme)
    _check_out(out, window.shape, scheme)
    width = 8 * window.dtype.itemsize
    bits = np.ascontiguousarray(window).view(np.dtype(f"uint{width}"))
    statistics = np.empty((len(window), len(kernels.STATISTICS)), np.float64)
    failed = kernels.quantizer(width)(
        bits,
        _KINDS[window.dtype.name],
        scheme.weight_dtype == "float8_e4m3fn",
        *block,
        out.codes.view(np.uint8),
        out.scales,
        statistics,
    )
    if failed >= 0:
        raise _non_finite(window[failed], first_row + failed)
    columns = dict(zip(kernels.STATISTICS, statistics.T, strict=True))
    return out, QualityRows(**columns, columns=window.shape[1])


def _rounded(window: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """To float32, half to even; what is too large for it becomes infinite, and is refused as that."""
    with np.errstate(over="ignore"):
        return window.astype(np.float32)


def _check(window: npt.NDArray[Any], scheme: Scheme, first_row: int, total_rows: int) -> tuple[int, int]:
    """Refuse what cannot be quantized; returns the block in rows and columns (a row, for per-channel scales)."""
    if window.dtype.name not in SOURCE_DTYPES:
        raise ValueError(
            f"weight window of type {window.dtype.name}: expected one of {', '.join(SOURCE_DTYPES)}; convert it first"
        )
    if scheme.weight_dtype not in QUANTIZED_DTYPES:
        raise ValueError(f"weight_dtype {scheme.weight_dtype!r}: expected one of {', '.join(QUANTIZED_DTYPES)}")
    if window.ndim != 2 or window.size == 0:
        raise ValueError(
            f"weight window of shape {list(window.shape)}: expected [rows, in], neither of them 0; "
            "pass the matrices of a stack one by one"
        )
    last_row = first_row + len(window)
    step = 1 if scheme.weight_block_size is None else scheme.weight_block_size[0]
    if first_row < 0 or last_row > total_rows or first_row % step or (last_row % step and last_row != total_rows):
        raise ValueError(
            f"weight window [{first_row}, {last_row}) of {total_rows} rows: expected bounds within them that are "
            f"multiples of {step} (or the end), since that many rows share a scale; choose such a window"
        )
    return scheme.weight_block_size or (1, window.shape[1])


def _check_out(out: QArray, shape: tuple[int, ...], scheme: Scheme) -> None:
    codes = BY_NAME[scheme.weight_dtype].numpy
    scales = scales_shape((shape[0], shape[1]), scheme.weight_block_size)
    for name, array, dtype, wanted in (("codes", out.codes, codes, shape), ("scales", out.scales, np.float32, scales)):
        writable = array.flags.c_contiguous and array.flags.writeable and array.flags.aligned
        if array.dtype != dtype or array.shape != wanted or not writable:
            raise ValueError(
                f"output buffer `{name}`: expected a writable C-contiguous {np.dtype(dtype).name} {list(wanted)}, "
                f"got {array.dtype.name} {list(array.shape)} "
                f"(strides {array.strides}, writable {array.flags.writeable}); use QArray.empty"
            )


def _non_finite(row: npt.NDArray[Any], index: int) -> NonFiniteWeightError:
    values = row.astype(np.float32)
    columns = np.flatnonzero(~np.isfinite(values))
    return NonFiniteWeightError(
        f"weight row {index}, column {columns[0]}: expected a finite number, got {values[columns[0]]} "
        f"({len(columns)} such in this row); repair or re-download the checkpoint"
    )
