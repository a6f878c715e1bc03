"""NaN and infinities among numbers that are not quantized."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from podquant.errors import NonFiniteWeightError
from podquant.quantize.finite import refuse_nonfinite

FLOATS = [ml_dtypes.bfloat16, np.float16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_and_the_smallest_are_finite(dtype: Any) -> None:
    info = ml_dtypes.finfo(dtype)
    values = np.array([[info.max, info.min, info.smallest_subnormal, 0.0, -0.0, 1.0]], dtype)
    refuse_nonfinite(values, 0)
    refuse_nonfinite(values[:0], 0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_that_is_not_is_named(dtype: Any, value: float) -> None:
    values = np.ones((70_000, 3), dtype)
    values[69_000, 1] = value
    with pytest.raises(NonFiniteWeightError, match=rf"row 69005, column 1: expected a finite number, got {value}\. It"):
        refuse_nonfinite(values, 5)


def test_other_types_have_none() -> None:
    refuse_nonfinite(np.full((2, 2), -1, np.int64), 0)
    refuse_nonfinite(np.ones((2, 2), bool), 0)
