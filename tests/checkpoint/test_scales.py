"""Scales that no quantized weight may have."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from podquant.checkpoint.scales import refuse_wrong_scales
from podquant.errors import ArtifactError, CheckpointError

CODES = np.ones((6, 8), np.int8)
CODES[4:, 4:] = 0
CODES[5] = 0


def check(scales: Any, block: tuple[int, int] | None = None, first: int = 0) -> None:
    refuse_wrong_scales(np.asarray(scales, np.float32), first, "f: s", lambda a, b: CODES[a:b], block, CheckpointError)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
def test_not_finite_or_negative(value: float) -> None:
    message = f"f: s: expected scales that are finite and greater than 0, got {value} in row 12, column 0"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        check([[1.0], [1.0], [value]], first=10)


def test_zero_only_over_codes_that_are_zero() -> None:
    check([[0.5, 0.5], [0.5, 0.5], [0.5, 0.0]], block=(2, 4))
    check([[0.0]], first=5)
    with pytest.raises(CheckpointError, match=r"the scale in row 2, column 0 is 0, over codes that are not"):
        check([[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]], block=(2, 4))
    with pytest.raises(CheckpointError, match=r"the scale in row 4, column 0 is 0"):
        check([[0.0]], first=4)


def test_the_error_is_the_callers() -> None:
    with pytest.raises(ArtifactError):
        refuse_wrong_scales(np.full((1, 1), np.nan), 0, "", lambda a, b: CODES, None, ArtifactError)
