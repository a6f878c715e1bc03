from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from podquant.quantize.activations import quantize_per_token, split_int8

QMAX = {"int8": 127.0, "float8_e4m3fn": 448.0}
SOURCES = pytest.mark.parametrize("source", [jnp.bfloat16, jnp.float32])
TARGETS = pytest.mark.parametrize("target", ["int8", "float8_e4m3fn"])


def tokens(shape: tuple[int, ...], source: Any) -> jax.Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal(shape) * np.exp2(rng.integers(-20, 20, (*shape[:-1], 1))), source)


def float64(x: jax.Array) -> npt.NDArray[np.float64]:
    return np.asarray(x).astype(np.float64)


@SOURCES
@TARGETS
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (2, 3, 64)])
def test_codes_and_scales_per_token(shape: tuple[int, ...], source: Any, target: str) -> None:
    x = tokens(shape, source)
    codes, scale = jax.jit(quantize_per_token, static_argnums=1)(x, target)
    assert (codes.dtype, codes.shape) == (jnp.dtype(target), shape)
    assert (scale.dtype, scale.shape) == (jnp.float32, (*shape[:-1], 1))
    exact = float64(x)
    np.testing.assert_allclose(float64(scale), np.abs(exact).max(-1, keepdims=True) / QMAX[target], rtol=2e-7)
    ratio = exact / float64(scale)
    step = 1.0 if target == "int8" else np.exp2(np.floor(np.log2(np.maximum(np.abs(ratio), 2.0**-6))) - 3)
    assert (np.abs(ratio - float64(codes)) <= step / 2 * (1 + 1e-4)).all()


def test_int8_rounds_half_to_even_not_toward_zero() -> None:
    x = jnp.array([[127.0, 0.5, 1.5, -2.5, 0.6, -126.9]], jnp.float32)
    codes, scale = quantize_per_token(x, "int8")
    assert codes.tolist() == [[127, 0, 2, -2, 1, -127]]
    assert scale.tolist() == [[1.0]]


def test_float8_casts_as_ml_dtypes_does() -> None:
    values = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    wide = values.astype(np.float32)
    keep = (np.abs(wide) <= 448) & ((np.abs(wide) >= np.finfo(np.float32).smallest_normal) | (wide == 0))
    codes, scale = quantize_per_token(jnp.asarray(values[keep])[None], "float8_e4m3fn")
    assert scale.tolist() == [[1.0]]
    expected = wide[keep].astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(codes)[0].view(np.uint8), expected.view(np.uint8))


@TARGETS
def test_zero_and_tiny_tokens_have_usable_scales(target: str) -> None:
    tiny = float(np.finfo(np.float32).smallest_normal)
    codes, scale = quantize_per_token(jnp.array([[0.0, -0.0], [tiny, 2 * tiny], [1.0, 0.0]], jnp.float32), target)
    assert float64(scale)[:2, 0].tolist() == [1.0, tiny]
    assert float64(codes)[:2].tolist() == [[0.0, 0.0], [1.0, 2.0]]


@TARGETS
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_token_that_is_not_finite_shows_in_its_scale_alone(target: str, value: float) -> None:
    _, scale = quantize_per_token(jnp.array([[1.0, value], [1.0, 2.0]], jnp.float32), target)
    assert np.isfinite(float64(scale)).tolist() == [[False], [True]]


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ValueError, match="activation dtype 'int4': expected one of int8, float8_e4m3fn"):
        quantize_per_token(jnp.ones((1, 2)), "int4")


@SOURCES
def test_split_int8_is_near_exact(source: Any) -> None:
    x = tokens((7, 513), source)
    high, low, scale = jax.jit(split_int8)(x)
    assert high.dtype == low.dtype == jnp.int8
    assert scale.dtype == jnp.float32
    restored = float64(scale) * (float64(high) + float64(low) / 254)
    error = np.abs(restored - float64(x)).max(-1) / np.abs(float64(x)).max(-1)
    assert error.max() <= 1.6e-5
    assert (np.abs(float64(high)) <= 127).all()
    assert (np.abs(float64(low)) <= 127).all()


def test_split_int8_of_a_zero_token() -> None:
    high, low, scale = split_int8(jnp.zeros((1, 3), jnp.bfloat16))
    assert (high.tolist(), low.tolist(), scale.tolist()) == ([[0, 0, 0]], [[0, 0, 0]], [[1.0]])


def test_split_int8_product_is_that_of_two_int8_matmuls() -> None:
    x = tokens((4, 64), jnp.float32)
    weight = np.random.default_rng(1).integers(-127, 128, (64, 8)).astype(np.int8)
    high, low, scale = split_int8(x)
    both = jnp.matmul(jnp.concatenate([high, low]), weight, preferred_element_type=jnp.int32)
    product = float64(scale) * (float64(both[:4]) + float64(both[4:]) / 254)
    expected = float64(x) @ weight.astype(np.float64)
    magnitude = np.abs(float64(x)).max(-1, keepdims=True) * np.abs(weight.astype(np.float64)).sum(0)
    assert (np.abs(product - expected) <= 1.6e-5 * magnitude).all()
