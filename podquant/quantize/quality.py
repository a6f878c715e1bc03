"""How much quantization changed a weight: statistics per row, and the figures of a tensor from those of its rows.

Each row's statistics are computed in one fixed order and the sums over rows are exact (`math.fsum`), so the figures do
not depend on how a tensor was cut into windows or on their order. Knows nothing of how codes are computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class QualityRows:
    """What quantization did to each row of a window. Float64 arrays with one element per row.

    Attributes:
        signal: the sum of W².
        noise: the sum of (W - q·s)².
        max_error: the largest |W - q·s|.
        absmax: the largest |W| of the row, or with blocks of its row of blocks.
        zeros: how many codes are zero.
        scale_min: the smallest scale in the row.
        scale_max: the largest scale in the row.
        columns: the length of a row.
    """

    signal: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]
    max_error: npt.NDArray[np.float64]
    absmax: npt.NDArray[np.float64]
    zeros: npt.NDArray[np.float64]
    scale_min: npt.NDArray[np.float64]
    scale_max: npt.NDArray[np.float64]
    columns: int


@dataclass(frozen=True)
class Quality:
    """The figures of one tensor.

    Attributes:
        sqnr_db: 10·log10(signal / noise); None if the codes represent the weights exactly (no noise).
        max_error_ratio: the largest |W - q·s| over the largest |W|; 0 for a tensor of zeros.
        zeros_share: the share of codes that are zero, 0 to 1.
        scale_min: the smallest scale (1 where a channel or block is all zero).
        scale_max: the largest scale.
    """

    sqnr_db: float | None
    max_error_ratio: float
    zeros_share: float
    scale_min: float
    scale_max: float

    @classmethod
    def of(cls, windows: Iterable[QualityRows]) -> Quality:
        """The figures of the tensor that these windows make up, in any order; at least one row."""
        parts = list(windows)

        def rows(name: str) -> npt.NDArray[Any]:
            return np.concatenate([getattr(part, name) for part in parts])

        signal, noise = math.fsum(rows("signal")), math.fsum(rows("noise"))
        absmax = float(rows("absmax").max())
        elements = sum(len(part.zeros) * part.columns for part in parts)
        return cls(
            sqnr_db=10 * math.log10(signal / noise) if noise > 0 else None,
            max_error_ratio=float(rows("max_error").max()) / absmax if absmax > 0 else 0.0,
            zeros_share=math.fsum(rows("zeros")) / elements,
            scale_min=float(rows("scale_min").min()),
            scale_max=float(rows("scale_max").max()),
        )
