from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from podquant.config.scheme import Scheme
from podquant.quantize.qarray import QArray, scales_shape


def test_scales_of_partial_blocks_are_counted() -> None:
    assert scales_shape((5, 7), None) == (5, 1)
    assert scales_shape((256, 384), (128, 128)) == (2, 3)
    assert scales_shape((257, 1), (128, 128)) == (3, 1)


def test_empty_takes_types_and_shapes_from_the_scheme() -> None:
    array = QArray.empty((5, 7), Scheme("float8_e4m3fn", weight_block_size=(2, 4)))
    assert (array.codes.dtype, array.codes.shape) == (np.dtype(ml_dtypes.float8_e4m3fn), (5, 7))
    assert (array.scales.dtype, array.scales.shape) == (np.dtype(np.float32), (3, 2))
    assert array.block == (2, 4)


def test_dequantize_per_channel() -> None:
    array = QArray(np.array([[1, -2], [3, 0]], np.int8), np.array([[0.5], [2.0]], np.float32))
    assert array.dequantize().tolist() == [[0.5, -1.0], [6.0, 0.0]]
    assert array.dequantize().dtype == np.float32


def test_dequantize_per_block_with_partial_blocks() -> None:
    codes = np.ones((3, 5), ml_dtypes.float8_e4m3fn)
    scales = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    expected = [[1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    assert QArray(codes, scales, (2, 2)).dequantize().tolist() == expected


def test_a_window_is_a_view() -> None:
    array = QArray.empty((5, 4), Scheme("int8", weight_block_size=(2, 2)))
    window = array.window(2, 5)
    window.codes[...] = 7
    window.scales[...] = 0.25
    assert (array.codes[2:] == 7).all()
    assert (array.scales[1:] == 0.25).all()
    assert window.scales.shape == (2, 2)


@pytest.mark.parametrize("bounds", [(1, 4), (2, 3), (-2, 2), (0, 6), (4, 2)])
def test_a_window_that_splits_a_block_is_refused(bounds: tuple[int, int]) -> None:
    array = QArray.empty((5, 4), Scheme("int8", weight_block_size=(2, 2)))
    with pytest.raises(ValueError, match=rf"window \[{bounds[0]}, {bounds[1]}\) of a .* 5 rows: .* multiples of 2"):
        array.window(*bounds)
