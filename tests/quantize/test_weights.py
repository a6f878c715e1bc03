"""Weights against a plain NumPy float64 rendering of the equations in `podquant/quantize/weights.py`, bit for bit."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podquant.config.scheme import Scheme
from podquant.errors import NonFiniteWeightError
from podquant.quantize.qarray import QArray
from podquant.quantize.quality import Quality, QualityRows
from podquant.quantize.weights import quantize_weight, quantize_window

Array = npt.NDArray[Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
TINY = np.finfo(np.float32).smallest_normal
SOURCES = pytest.mark.parametrize("source", [BF16, F16, F32], ids=str)
TARGETS = pytest.mark.parametrize("target", ["int8", "float8_e4m3fn"])


def to_float32(values: Array) -> Array:
    """Float64 rounded to float32; quotients of two float32 come out as one float32 division would have them."""
    with np.errstate(under="ignore"):
        return values.astype(np.float32)


def reference(weight: Array, scheme: Scheme) -> tuple[Array, Array]:
    """Codes and scales by the equations: float64 quotients rounded to float32, `rint`, ml_dtypes' cast."""
    exact = weight.astype(np.float64)
    rows, columns = exact.shape
    bo, bi = scheme.weight_block_size or (1, columns)
    qmax = {"int8": 127.0, "float8_e4m3fn": 448.0}[scheme.weight_dtype]
    scales = np.empty((-(-rows // bo), -(-columns // bi)), np.float32)
    codes = np.empty((rows, columns), {"int8": np.int8, "float8_e4m3fn": E4M3}[scheme.weight_dtype])
    for b in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            part = np.s_[b * bo : (b + 1) * bo, c * bi : (c + 1) * bi]
            absmax = np.abs(exact[part]).max()
            scale = np.float32(1) if absmax == 0 else np.maximum(to_float32(absmax / qmax), TINY)
            ratio = np.clip(to_float32(exact[part] / np.float64(scale)), -qmax, qmax)
            scales[b, c] = scale
            codes[part] = np.rint(ratio).astype(np.int8) if scheme.weight_dtype == "int8" else ratio.astype(E4M3)
    return codes, scales


def assert_same_bits(actual: QArray, codes: Array, scales: Array) -> None:
    assert actual.codes.dtype == codes.dtype
    np.testing.assert_array_equal(actual.codes.view(np.uint8), codes.view(np.uint8))
    np.testing.assert_array_equal(actual.scales.view(np.uint32), scales.view(np.uint32))


def random_weight(seed: int, shape: tuple[int, int], source: np.dtype[Any]) -> Array:
    """Rows of every magnitude the type holds, with zeros of both signs and whole zero rows and columns among them."""
    rng = np.random.default_rng(seed)
    info = ml_dtypes.finfo(source)
    exponents = rng.uniform(np.log2(float(info.smallest_subnormal)), np.log2(float(info.max)) - 4, (shape[0], 1))
    values = rng.standard_normal(shape) * np.exp2(exponents)
    values[rng.random(shape) < 0.05] = 0.0
    values[rng.random(shape) < 0.05] = -0.0
    values[rng.random(shape[0]) < 0.1] = 0.0
    values[:, rng.random(shape[1]) < 0.1] *= 0.0
    with np.errstate(under="ignore"):
        return values.astype(source)


def adversarial(source: np.dtype[Any]) -> Array:
    """Rows that rounding, ranges and signs can go wrong on; 300 columns, so that lanes wrap."""
    info = ml_dtypes.finfo(source)
    small, normal, largest = float(info.smallest_subnormal), float(info.smallest_normal), float(info.max)
    ties = np.concatenate([[127.0], np.arange(-126.5, 127.0)])
    eighths = np.concatenate([[448.0], np.arange(-17, 18) / 1024, np.arange(-40, 40) + 0.5])
    rows: list[Array | list[float]] = [
        ties,
        -ties,
        ties * 2.0**-9,
        eighths,
        -eighths,
        [0.0],
        [-0.0, 0.0],
        [small],
        [-small, small],
        [3 * small, small, -2 * small],
        [normal, normal - small, -normal],
        [127 * normal, 63 * normal, normal],
        [448 * normal, 7 * normal, 0.5 * normal, -normal],
        [largest, -largest, largest / 2],
        [largest, small, -small],
        [largest / 127, 1.0],
        [0.0, 0.0, -3.0],
        np.geomspace(normal, largest / 2, 290),
        -np.geomspace(small, 1.0, 290),
        np.linspace(-1.0, 1.0, 300),
    ]
    weight = np.zeros((len(rows), 300))
    for index, row in enumerate(rows):
        weight[index, : len(row)] = row
    with np.errstate(under="ignore"):
        return weight.astype(source)


@SOURCES
@TARGETS
@pytest.mark.parametrize("block", [None, (1, 7), (3, 128), (128, 128)])
def test_adversarial_rows_match_the_reference(
    source: np.dtype[Any], target: str, block: tuple[int, int] | None
) -> None:
    weight, scheme = adversarial(source), Scheme(target, weight_block_size=block)
    assert_same_bits(quantize_weight(weight, scheme), *reference(weight, scheme))


def all_finite(source: np.dtype[Any], limit: float) -> Array:
    values = np.arange(2**16, dtype=np.uint16).view(source)
    return values[np.abs(values.astype(np.float32)) <= limit]


@pytest.mark.parametrize("source", [BF16, F16], ids=str)
@pytest.mark.parametrize(("target", "qmax"), [("int8", 127.0), ("float8_e4m3fn", 448.0)])
def test_every_16_bit_value_under_scale_1(source: np.dtype[Any], target: str, qmax: float) -> None:
    values = all_finite(source, qmax)
    result = quantize_weight(values[None], Scheme(target))
    assert result.scales.tolist() == [[1.0]]
    wide = values.astype(np.float32)
    expected = np.rint(wide).astype(np.int8) if target == "int8" else wide.astype(E4M3)
    np.testing.assert_array_equal(result.codes[0].view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("target", ["int8", "float8_e4m3fn"])
def test_float32_around_every_rounding_boundary(target: str) -> None:
    dtype = np.dtype(np.int8) if target == "int8" else E4M3
    grid = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    grid = np.unique(grid[np.isfinite(grid) & (grid > -128 if target == "int8" else True)])
    middles = (grid[1:] + grid[:-1]) / 2
    below, above = np.nextafter(middles, np.float32(-1000)), np.nextafter(middles, np.float32(1000))
    values = np.concatenate([grid, middles, below, above])
    result = quantize_weight(values[None], Scheme(target))
    assert result.scales.tolist() == [[1.0]]
    expected = np.rint(values).astype(np.int8) if target == "int8" else values.astype(E4M3)
    np.testing.assert_array_equal(result.codes[0].view(np.uint8), expected.view(np.uint8))


shapes = st.tuples(st.sampled_from([1, 2, 3, 5, 17, 33]), st.sampled_from([1, 2, 31, 255, 256, 257, 530]))
blocks = st.sampled_from([None, None, (1, 1), (2, 3), (4, 128), (128, 128), (5, 300)])
cases = st.tuples(
    st.integers(0, 2**32), shapes, st.sampled_from([BF16, F16, F32]), st.sampled_from(["int8", "float8_e4m3fn"]), blocks
)


@settings(max_examples=150, deadline=None)
@given(cases)
def test_random_weights_match_the_reference(case: tuple[Any, ...]) -> None:
    seed, shape, source, target, block = case
    weight, scheme = random_weight(seed, shape, source), Scheme(target, weight_block_size=block)
    assert_same_bits(quantize_weight(weight, scheme), *reference(weight, scheme))


@settings(max_examples=150, deadline=None)
@given(cases, st.data())
def test_windows_do_not_change_bytes_or_quality(case: tuple[Any, ...], data: st.DataObject) -> None:
    seed, shape, source, target, block = case
    weight, scheme = random_weight(seed, shape, source), Scheme(target, weight_block_size=block)
    whole, statistics = quantize_window(weight, scheme, first_row=0, total_rows=len(weight))
    step = block[0] if block else 1
    cuts = data.draw(st.sets(st.integers(1, max(1, (len(weight) - 1) // step))))
    bounds = [0, *sorted(cut * step for cut in cuts if cut * step < len(weight)), len(weight)]
    windows = data.draw(st.permutations(list(itertools.pairwise(bounds))))
    out = QArray.empty(weight.shape, scheme)
    parts = [
        quantize_window(weight[a:b], scheme, first_row=a, total_rows=len(weight), out=out.window(a, b))[1]
        for a, b in windows
    ]
    assert_same_bits(out, whole.codes, whole.scales)
    assert Quality.of(parts) == Quality.of([statistics])


def test_rounding_is_to_nearest_not_toward_zero() -> None:
    row = np.array([[127.0, 0.6, -0.6, 1.5, 2.5, -126.9]], np.float32)
    assert quantize_weight(row, Scheme("int8")).codes.tolist() == [[127, 1, -1, 2, 2, -127]]


def test_sqnr_of_gaussian_weights_is_that_of_rounding() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 4096)).astype(BF16)
    _, int8 = quantize_window(weight, Scheme("int8"), first_row=0, total_rows=64)
    _, float8 = quantize_window(weight, Scheme("float8_e4m3fn"), first_row=0, total_rows=64)
    sqnr_int8, sqnr_float8 = Quality.of([int8]).sqnr_db, Quality.of([float8]).sqnr_db
    assert sqnr_int8 is not None
    assert 40.5 < sqnr_int8 < 42
    assert sqnr_float8 is not None
    assert 31 < sqnr_float8 < 32.5


def float64_statistics(weight: Array, result: QArray) -> QualityRows:
    exact = weight.astype(np.float64)
    scales, rows, columns = result.scales, *exact.shape
    bo, bi = result.block or (1, columns)
    spread = scales.astype(np.float64).repeat(bo, 0)[:rows].repeat(bi, 1)[:, :columns]
    error = exact - result.codes.astype(np.float64) * spread
    absmax = np.array([np.abs(exact[r // bo * bo : (r // bo + 1) * bo]).max() for r in range(rows)])
    return QualityRows(
        signal=(exact**2).sum(1),
        noise=(error**2).sum(1),
        max_error=np.abs(error).max(1),
        absmax=absmax,
        zeros=(result.codes.astype(np.float32) == 0).sum(1).astype(np.float64),
        scale_min=spread.min(1),
        scale_max=spread.max(1),
        columns=columns,
    )


@SOURCES
@TARGETS
@pytest.mark.parametrize("block", [None, (4, 100)])
@pytest.mark.parametrize("magnitude", [1.0, 2.0**-10])
def test_statistics_match_float64(
    source: np.dtype[Any], target: str, block: tuple[int, int] | None, magnitude: float
) -> None:
    values = np.random.default_rng(1).standard_normal((10, 1030)) * magnitude
    values[3] = 0
    values[:, 700:] *= 100
    values[:, 200:300] = 0
    weight = values.astype(source)
    result, rows = quantize_window(weight, Scheme(target, weight_block_size=block), first_row=0, total_rows=10)
    expected = float64_statistics(weight, result)
    for name in ("zeros", "absmax", "scale_min", "scale_max"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(expected, name), err_msg=name)
    for name in ("signal", "noise", "max_error"):
        np.testing.assert_allclose(getattr(rows, name), getattr(expected, name), rtol=1e-4, err_msg=name)
    assert rows.columns == 1030


@pytest.mark.parametrize("magnitude", [1e-30, 1e36])
def test_statistics_neither_underflow_nor_overflow(magnitude: float) -> None:
    weight = (np.random.default_rng(2).standard_normal((4, 512)) * magnitude).astype(np.float32)
    _, rows = quantize_window(weight, Scheme("int8"), first_row=0, total_rows=4)
    sqnr = Quality.of([rows]).sqnr_db
    assert sqnr is not None
    assert 38 < sqnr < 46


def test_read_only_unaligned_and_strided_windows_give_the_same_bytes() -> None:
    weight = random_weight(5, (6, 40), BF16)
    expected = quantize_weight(weight, Scheme("int8"))
    raw = np.frombuffer(b"x" + weight.tobytes(), np.uint8)[1:]
    unaligned = raw.view(BF16).reshape(weight.shape)
    assert not unaligned.flags.aligned
    assert not unaligned.flags.writeable
    strided = np.repeat(weight, 2, axis=1)[:, ::2]
    for window in (unaligned, strided):
        assert_same_bits(quantize_weight(window, Scheme("int8")), expected.codes, expected.scales)


def test_threads_give_the_same_bytes() -> None:
    weight, scheme = random_weight(6, (64, 700), BF16), Scheme("float8_e4m3fn")
    out = QArray.empty(weight.shape, scheme)

    def work(first: int) -> None:
        stop = first + 8
        quantize_window(weight[first:stop], scheme, first_row=first, total_rows=64, out=out.window(first, stop))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(0, 64, 8)))
    assert_same_bits(out, *reference(weight, scheme))


@SOURCES
@TARGETS
@pytest.mark.parametrize("block", [None, (4, 16)])
@pytest.mark.parametrize(("value", "text"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_non_finite_weights_are_named_by_row_and_column(
    source: np.dtype[Any], target: str, block: tuple[int, int] | None, value: float, text: str
) -> None:
    weight = np.ones((10, 40), source)
    weight[6, [33, 35]] = value
    weight[7, 0] = value
    expected = rf"row 106, column 33: expected a finite number, got {text} \(2 such in this row\)"
    with pytest.raises(NonFiniteWeightError, match=expected):
        quantize_window(weight, Scheme(target, weight_block_size=block), first_row=100, total_rows=110)


@pytest.mark.parametrize("block", [(4, 16)])
@pytest.mark.parametrize(("first", "rows"), [(2, 4), (4, 3), (-4, 4), (8, 4)])
def test_windows_across_blocks_or_outside_the_weight_are_refused(block: tuple[int, int], first: int, rows: int) -> None:
    window = np.ones((rows, 16), np.float32)
    with pytest.raises(ValueError, match=rf"window \[{first}, {first + rows}\) of 10 rows.*multiples of 4"):
        quantize_window(window, Scheme("int8", weight_block_size=block), first_row=first, total_rows=10)


@pytest.mark.parametrize(
    ("window", "scheme", "text"),
    [
        (np.ones((2, 2), np.int32), Scheme("int8"), "type int32: expected one of bfloat16"),
        (np.ones((2, 2), np.float32), Scheme("int4"), "weight_dtype 'int4': expected one of int8"),
        (np.ones((2, 0), np.float32), Scheme("int8"), r"shape \[2, 0\]"),
        (np.ones((2, 2, 2), np.float32), Scheme("int8"), r"shape \[2, 2, 2\].*one by one"),
    ],
)
def test_what_cannot_be_quantized_is_refused(window: Array, scheme: Scheme, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        quantize_weight(window, scheme)


@pytest.mark.parametrize(
    ("codes", "scales", "text"),
    [
        (np.empty((2, 4), np.uint8), np.empty((2, 1), np.float32), "`codes`: expected .* int8"),
        (np.empty((2, 3), np.int8), np.empty((2, 1), np.float32), r"`codes`: .*\[2, 4\]"),
        (np.empty((2, 8), np.int8)[:, ::2], np.empty((2, 1), np.float32), "`codes`: .*strides"),
        (np.empty((2, 4), np.int8), np.empty((1, 2), np.float32), r"`scales`: .*\[2, 1\]"),
        (np.empty((2, 4), np.int8), np.empty((2, 1), np.float64), "`scales`: .*float32"),
    ],
)
def test_output_buffers_that_do_not_fit_are_refused(codes: Array, scales: Array, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        quantize_window(
            np.ones((2, 4), np.float32), Scheme("int8"), first_row=0, total_rows=2, out=QArray(codes, scales)
        )


@pytest.mark.slow
def test_an_install_whose_cache_cannot_be_written_still_works() -> None:
    script = (
        "import numpy as np\n"
        "from podquant.config.scheme import Scheme\n"
        "from podquant.quantize.weights import quantize_weight\n"
        "print(quantize_weight(np.array([[127.0, 0.6]], np.float32), Scheme('int8')).codes.tolist())\n"
    )
    # Only the locator for zipped packages: none fits, which is what numba sees where no directory can be written.
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "ZipCacheLocator"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[[127, 1]]"


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_float64_is_rounded_to_float32_once(dtype: str) -> None:
    weight = np.random.default_rng(3).standard_normal((5, 64))
    wide, _ = quantize_window(weight, Scheme(dtype), first_row=0, total_rows=5)
    single, _ = quantize_window(weight.astype(np.float32), Scheme(dtype), first_row=0, total_rows=5)
    np.testing.assert_array_equal(wide.codes.view(np.uint8), single.codes.view(np.uint8))
    np.testing.assert_array_equal(wide.scales, single.scales)
    weight[2, 3] = 1e300
    with pytest.raises(NonFiniteWeightError, match="weight row 2, column 3: expected a finite number, got inf"):
        quantize_window(weight, Scheme(dtype), first_row=0, total_rows=5)
