"""A quantized matrix on the host: codes, scales and the equation relating them. Knows nothing of files or devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from podquant.config.scheme import Scheme
from podquant.dtypes import BY_NAME


def scales_shape(shape: tuple[int, int], block: tuple[int, int] | None) -> tuple[int, int]:
    """The shape of the scales of a matrix: `[out, 1]`, or one per block, the last ones of a row and column partial."""
    if block is None:
        return shape[0], 1
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


@dataclass(frozen=True)
class QArray:
    """A matrix `W[out, in]` as codes and scales, in Hugging Face's layout.

        per channel   W[o, i] ≈ codes[o, i] · scales[o, 0]                    block is None
        per block     W[o, i] ≈ codes[o, i] · scales[o // bo, i // bi]        block is (bo, bi)

    Every scale is positive, finite and no smaller than the smallest normal float32; an all-zero channel or block has
    scale 1. int8 codes lie in [-127, 127]; float8_e4m3fn codes are finite.

    Attributes:
        codes: int8 or float8_e4m3fn, `[out, in]`.
        scales: float32, `scales_shape((out, in), block)`.
        block: the rows and columns that share a scale, or None.
    """

    codes: npt.NDArray[Any]
    scales: npt.NDArray[np.float32]
    block: tuple[int, int] | None = None

    @classmethod
    def empty(cls, shape: tuple[int, int], scheme: Scheme) -> Self:
        """Buffers, not yet filled, for a weight of this shape."""
        block = scheme.weight_block_size
        codes = np.empty(shape, BY_NAME[scheme.weight_dtype].numpy)
        return cls(codes, np.empty(scales_shape(shape, block), np.float32), block)

    def window(self, first_row: int, last_row: int) -> Self:
        """A view of rows `[first_row, last_row)`, both multiples of the block's rows or the end of the matrix."""
        rows, step = len(self.codes), 1 if self.block is None else self.block[0]
        if not 0 <= first_row <= last_row <= rows or first_row % step or (last_row % step and last_row != rows):
            raise ValueError(
                f"window [{first_row}, {last_row}) of a quantized array of {rows} rows: expected bounds within it that "
                f"are multiples of {step} (or its end), since that many rows share a scale; choose such a window"
            )
        scales = self.scales[first_row // step : -(-last_row // step)]
        return type(self)(self.codes[first_row:last_row], scales, self.block)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The float32 matrix `[out, in]` that codes and scales represent."""
        scales = self.scales
        if self.block is not None:
            rows, columns = self.codes.shape
            scales = scales.repeat(self.block[0], axis=0)[:rows].repeat(self.block[1], axis=1)[:, :columns]
        return np.asarray(self.codes.astype(np.float32) * scales)
