"""Finds what is not finite among numbers of any float type, by their bits. Knows nothing of files or names."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from podquant.errors import NonFiniteWeightError

_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
"""The bits that are all set in NaN and infinities, and in no finite number."""

_AT_A_TIME = 1 << 16
"""Numbers that are looked at together: few enough that what is made of them stays in the processor's cache."""


def refuse_nonfinite(values: npt.NDArray[Any], first_row: int) -> None:
    """Refuse NaN and infinities; types that are no floats of 16 bits or more have none.

    Args:
        values: [rows, columns], C-contiguous.
        first_row: the number of the first, for the message.

    Raises:
        NonFiniteWeightError: names the first row and column; the caller adds tensor and file.
    """
    mask = _EXPONENTS.get(values.dtype.name)
    if mask is None or values.size == 0:
        return
    unsigned = np.dtype(f"uint{8 * values.dtype.itemsize}").type
    bits = values.view(unsigned).reshape(-1)
    for start in range(0, len(bits), _AT_A_TIME):
        wrong = np.flatnonzero((bits[start : start + _AT_A_TIME] & unsigned(mask)) == unsigned(mask))
        if len(wrong):
            row, column = divmod(start + int(wrong[0]), values.shape[1])
            raise NonFiniteWeightError(
                f"row {first_row + row}, column {column}: expected a finite number, got {float(values[row, column])}. "
                "It is not quantized and would be kept: repair the checkpoint, or pass --allow-nonfinite"
            )
