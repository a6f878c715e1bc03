"""What no scale of quantized weights may be, whoever wrote it. Knows nothing of files or of how scales are stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from podquant.errors import PodquantError

Array = np.ndarray[Any, np.dtype[Any]]


def refuse_wrong_scales(
    scales: Array,
    first: int,
    where: str,
    read_codes: Callable[[int, int], Array],
    block: tuple[int, int] | None,
    error: type[PodquantError],
) -> None:
    """Refuse scales that are negative, NaN or infinite, or 0 over codes that are not all 0.

    Args:
        scales: some rows of them, [rows, columns].
        first: the number of the first row.
        where: file and tensor, for messages.
        read_codes: from a first and a last row (exclusive) of the weight to its codes [rows, in]; asked only where a
            scale is 0, of rows up to the end of a block that may lie beyond the weight's.
        block: rows and columns of the weight that share a scale; None: a row does.
        error: what to raise.
    """
    values = scales.astype(np.float32)
    wrong = np.argwhere(~(np.isfinite(values) & (values >= 0)))
    if len(wrong):
        row, column = (int(index) for index in wrong[0])
        raise error(
            f"{where}: expected scales that are finite and greater than 0, got {values[row, column]} in row "
            f"{first + row}, column {column}" + (f", and {len(wrong) - 1:,} more" if len(wrong) > 1 else "")
        )
    for row in np.unique(np.argwhere(values == 0)[:, 0]).tolist():
        height = 1 if block is None else block[0]
        codes = read_codes((first + row) * height, (first + row + 1) * height).astype(np.float32)
        for column in np.flatnonzero(values[row] == 0).tolist():
            width = codes.shape[1] if block is None else block[1]
            if codes[:, column * width : (column + 1) * width].any():
                raise error(
                    f"{where}: the scale in row {first + row}, column {column} is 0, over codes that are not: they "
                    "would all be lost"
                )
