"""Half of a matrix for every run, the other half for the `matrix` marker; see CONTRIBUTING.md."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

MATRIX = pytest.mark.matrix


def half(*factors: Sequence[Any]) -> list[Any]:
    """The cells of a matrix in the colours of a chessboard, the second colour marked.

    In the first is every value of each factor and, with three factors or more, every pair of values of any two.
    """
    cells = itertools.product(*(enumerate(factor) for factor in factors))
    return [
        pytest.param(*(value for _, value in cell), marks=MATRIX if sum(at for at, _ in cell) % 2 else ())
        for cell in cells
    ]
