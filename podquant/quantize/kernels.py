"""The compiled loops of weight quantization: bits in; codes, scales and row statistics out. Exact in IEEE float32.

Knows nothing of schemes, files or NumPy's names for types: sources come as unsigned integers of their width, so one
compiled kernel serves bfloat16 and float16 and a second one float32. `weights.py` says what is computed; here is how:

* Every arithmetic step is one IEEE float32 operation (no fastmath, no contraction), so the bytes are the same on every
  machine, and magnitudes are compared as integers, where max is associative and the compiler may vectorise it.
* Rounding adds and subtracts a power of two so large that its unit in the last place is the wanted step. The sum is
  rounded half to even by the hardware, and its low bits are the code.
* A row is cut into chunks, the last one padded with zeros. Sums run in `_LANES` float32 lanes, folded in a fixed order
  at the end of a row: vectorised, and the same for any windowing, since a lane depends only on the column.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
"""What the bits of a source mean. The first two are uint16, the last uint32."""

STATISTICS = ("signal", "noise", "max_error", "absmax", "zeros", "scale_min", "scale_max")
"""The columns of the row statistics; see `quality.QualityRows`."""

_LANES = 32
_TURNS = 8
_CHUNK = _LANES * _TURNS
_SIGNAL, _NOISE, _ERROR, _ZEROS = range(0, 4 * _LANES, _LANES)  # where the lanes of each sum begin

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal
_ROUND_TO_INTEGER = np.float32(1.5 * 2**23)  # one and a half: the sum stays in the binade for negative addends too
_ROUND_TO_INTEGER_BITS = _ROUND_TO_INTEGER.view(np.uint32)
_HALF_TO_SINGLE = np.float32(2.0**112)  # the exponent biases differ by 127 - 15

_inline = numba.njit(error_model="numpy", nogil=True)


@_inline
def _bits(value: Any) -> Any:
    return np.float32(value).view(np.uint32)


@_inline
def _float(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


@_inline
def _widen(source: Any, kind: int) -> Any:
    """One source element as float32: exact, subnormals included. `kind` is loop-invariant: compilers hoist the test."""
    wide = np.uint32(source)
    if kind == FLOAT32:
        return _float(wide)
    if kind == BFLOAT16:
        return _float(wide << np.uint32(16))
    magnitude = _float(np.uint32(wide & np.uint32(0x7FFF)) << np.uint32(13)) * _HALF_TO_SINGLE
    return _float(_bits(magnitude) | np.uint32(np.uint32(wide & np.uint32(0x8000)) << np.uint32(16)))


@_inline
def _absmax(bits: Any, magnitude: Any) -> Any:
    """The largest magnitude, as source bits: without the sign, floats order as their bits do, finite < Inf < NaN."""
    largest = magnitude ^ magnitude
    for k in range(len(bits)):
        largest = max(largest, bits[k] & magnitude)
    return largest


@_inline
def _int8(ratio: Any) -> Any:
    """The code of a ratio, and its value."""
    shifted = min(max(ratio, np.float32(-127)), np.float32(127)) + _ROUND_TO_INTEGER
    return np.uint8(np.uint32(_bits(shifted) - _ROUND_TO_INTEGER_BITS)), shifted - _ROUND_TO_INTEGER


@_inline
def _float8(ratio: Any) -> Any:
    """The code of a ratio, and the magnitude of its value."""
    sign = np.uint32(_bits(ratio) & ~_MAGNITUDE)
    clipped = min(abs(ratio), np.float32(448))
    # The binade, not below that of the smallest normal 2**-6: beneath it e4m3 keeps that binade's step, 2**-9.
    binade = np.uint32(max(_bits(clipped), np.uint32(0x3C800000)) & np.uint32(0x7F800000))
    shift_bits = np.uint32(binade + np.uint32(20 << 23))  # its unit in the last place: an eighth of the binade
    shift = _float(shift_bits)
    shifted = clipped + shift
    eighths = np.uint32(_bits(shifted) - shift_bits)  # 8 to 16, or 0 to 8 among the subnormals
    code = np.uint32(np.uint32(binade >> np.uint32(20)) - np.uint32(121 << 3) + eighths)
    return np.uint8(code | np.uint32(sign >> np.uint32(24))), shifted - shift


@numba.njit(error_model="numpy", nogil=True, forceinline=True)  # else `turns` is no constant: ten times slower
def _quantize_chunk(values: Any, turns: int, is_float8: bool, scale: Any, share: Any, codes: Any, lanes: Any) -> None:
    """Quantize `turns * _LANES` values and add to the lanes; errors count in units of the row, `scale / share`."""
    for k in range(_LANES):
        signal, noise, largest, zeros = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for turn in range(turns):  # a constant, so unrolled: the lanes are read and written once for all turns
            ratio = values[turn * _LANES + k] / scale
            if is_float8:
                code, rounded = _float8(ratio)
                ratio = abs(ratio)
            else:
                code, rounded = _int8(ratio)
            codes[turn * _LANES + k] = code
            error = ratio - rounded
            signal += ratio * ratio
            noise += error * error
            largest = max(largest, abs(error))
            zeros += np.float32(rounded == 0)
        lanes[_SIGNAL + k] += signal * (share * share)
        lanes[_NOISE + k] += noise * (share * share)
        lanes[_ERROR + k] = max(lanes[_ERROR + k], largest * share)
        lanes[_ZEROS + k] += zeros


@_inline
def _fold(lanes: Any) -> Any:
    """Sum float32 lanes pairwise, in place and in a fixed order."""
    half = len(lanes) // 2
    while half > 0:
        for k in range(half):
            lanes[k] += lanes[k + half]
        half //= 2
    return lanes[0]


@_inline
def _scale_blocks(
    bits: Any, kind: int, magnitude: Any, block: int, qmax: Any, scales: Any, shares: Any, tops: Any
) -> Any:
    """Fill the scales of one row of blocks, and each one's share of the largest; returns that and the absmax (bits)."""
    tops[:] = 0
    for r in range(bits.shape[0]):  # rows outside: memory is read in order
        for c in range(len(tops)):
            tops[c] = max(tops[c], _absmax(bits[r, c * block : (c + 1) * block], magnitude))
    unit = np.float32(0)
    for c in range(len(scales)):
        scales[c] = np.float32(1)
        shares[c] = np.float32(0)  # a block of zeros has no part in the statistics
        if tops[c] != 0:
            scales[c] = max(_widen(tops[c], kind) / qmax, _SMALLEST_NORMAL)
            shares[c] = scales[c]
            unit = max(unit, scales[c])
    if unit == 0:
        unit = np.float32(1)
    for c in range(len(scales)):
        shares[c] = shares[c] / unit
    return unit, tops.max()


@_inline
def _quantize_row(
    bits: Any,
    kind: int,
    is_float8: bool,
    block: int,
    scales: Any,
    shares: Any,
    codes: Any,
    lanes: Any,
    values: Any,
    spare: Any,
) -> int:
    """Quantize one row; returns how many zeros it was padded with, to whole chunks."""
    padding = 0
    for c in range(len(scales)):
        right = min((c + 1) * block, len(codes))
        for start in range(c * block, right, _CHUNK):
            source, target = bits[start : min(start + _CHUNK, right)], codes[start : min(start + _CHUNK, right)]
            for k in range(len(source)):
                values[k] = _widen(source[k], kind)
            if len(source) == _CHUNK:
                _quantize_chunk(values, _TURNS, is_float8, scales[c], shares[c], target, lanes)
            elif len(source) == _CHUNK // 2:  # the usual block, of 128 columns
                _quantize_chunk(values, _TURNS // 2, is_float8, scales[c], shares[c], target, lanes)
            else:
                values[len(source) :] = 0
                padding += _CHUNK - len(source)
                _quantize_chunk(values, _TURNS, is_float8, scales[c], shares[c], spare, lanes)
                target[:] = spare[: len(source)]
    return padding


def _quantize(
    bits: Any, kind: int, is_float8: bool, block_rows: int, block_columns: int, codes: Any, scales: Any, statistics: Any
) -> int:
    """Quantize a window of whole rows of blocks; returns the first row that holds NaN or Inf, or -1.

    Args:
        bits: the source `[rows, columns]`, uint16 or uint32.
        kind: what the bits mean: `BFLOAT16`, `FLOAT16` or `FLOAT32`.
        is_float8: write e4m3fn codes instead of int8 ones.
        block_rows: how many rows share a scale.
        block_columns: how many columns of them do.
        codes: output, uint8 `[rows, columns]`: the bits of the codes.
        scales: output, float32 `[ceil(rows / block_rows), ceil(columns / block_columns)]`.
        statistics: output, float64 `[rows, len(STATISTICS)]`.
    """
    infinity = 0x7F800000 if kind == FLOAT32 else (0x7F80 if kind == BFLOAT16 else 0x7C00)
    magnitude = bits.dtype.type(0x7FFFFFFF if kind == FLOAT32 else 0x7FFF)
    qmax = np.float32(448) if is_float8 else np.float32(127)
    lanes = np.empty(4 * _LANES, np.float32)
    values, spare = np.empty(_CHUNK, np.float32), np.empty(_CHUNK, np.uint8)  # a chunk; the codes of a padded one
    shares, tops = np.empty(scales.shape[1], np.float32), np.empty(scales.shape[1], bits.dtype)
    for b in range(scales.shape[0]):
        first, last = b * block_rows, min((b + 1) * block_rows, len(bits))
        unit, largest = _scale_blocks(bits[first:last], kind, magnitude, block_columns, qmax, scales[b], shares, tops)
        if largest >= infinity:
            while _absmax(bits[first], magnitude) < infinity:
                first += 1
            return first
        scale_min, scale_max = scales[b].min(), scales[b].max()
        for r in range(first, last):
            lanes[:] = 0
            padding = _quantize_row(
                bits[r], kind, is_float8, block_columns, scales[b], shares, codes[r], lanes, values, spare
            )
            statistics[r, 0] = np.float64(unit) * np.float64(unit) * np.float64(_fold(lanes[_SIGNAL:_NOISE]))
            statistics[r, 1] = np.float64(unit) * np.float64(unit) * np.float64(_fold(lanes[_NOISE:_ERROR]))
            statistics[r, 2] = np.float64(unit) * np.float64(lanes[_ERROR:_ZEROS].max())
            statistics[r, 3] = _widen(largest, kind)
            statistics[r, 4] = _fold(lanes[_ZEROS:]) - padding
            statistics[r, 5] = scale_min
            statistics[r, 6] = scale_max
    return -1


@cache
def quantizer(source_bits: int) -> Callable[..., int]:
    """The compiled `_quantize` for sources of 16 or 32 bits: compiled at first use, cached on disk where possible.

    The signature is fixed, so that read-only, writable and unaligned windows share one compiled function.
    """
    source = types.Array(types.uint32 if source_bits == 32 else types.uint16, 2, "C", readonly=True, aligned=False)
    signature = types.int64(
        source,
        types.int64,
        types.boolean,
        types.int64,
        types.int64,
        types.Array(types.uint8, 2, "C"),
        types.Array(types.float32, 2, "C"),
        types.Array(types.float64, 2, "C"),
    )
    try:
        compiled = numba.njit(signature, error_model="numpy", nogil=True, cache=True)(_quantize)
    except (RuntimeError, OSError):  # no directory for the cache is writable, or its disk is full
        compiled = numba.njit(signature, error_model="numpy", nogil=True)(_quantize)
    return compiled
