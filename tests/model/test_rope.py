"""Rotary embeddings against values transformers gives (tests/data/rope.json)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from podquant.families.config import NO_ROPE, ConfigReader, RopeConfig, read_rope
from podquant.model.rope import inverse_frequencies, logn_scale, rotate, rotation

CASES = json.loads((Path(__file__).parents[1] / "data" / "rope.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_frequencies_are_those_of_transformers(case: dict[str, Any]) -> None:
    rope = read_rope(ConfigReader(case["config"], "config.json"))
    frequencies, factor = inverse_frequencies(rope, case["head_dim"])
    assert frequencies.dtype == np.float32
    # transformers computes them in float32: powers of large bases differ in the last places.
    np.testing.assert_allclose(frequencies, case["inverse_frequencies"], rtol=2e-6)
    assert factor == pytest.approx(case["attention_factor"], rel=1e-7)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_rotations_are_those_of_transformers(case: dict[str, Any]) -> None:
    rope = read_rope(ConfigReader(case["config"], "config.json"))
    cos, sin = rotation(rope, case["head_dim"], jnp.asarray([case["positions"]]))
    assert cos.shape == (1, len(case["positions"]), 1, case["head_dim"] // 2)
    np.testing.assert_allclose(np.asarray(cos)[0, :, 0, ::8], case["cos"], atol=3e-4)
    np.testing.assert_allclose(np.asarray(sin)[0, :, 0, ::8], case["sin"], atol=3e-4)


def test_the_pairs_are_the_two_halves_of_a_head() -> None:
    """Each pair (x[i], x[i + H/2]) turns by its angle, as a complex number does."""
    random = np.random.default_rng(3)
    x = random.standard_normal((1, 3, 2, 8), np.float32)
    angles = random.uniform(-3, 3, (1, 3, 1, 4)).astype(np.float32)
    got = np.asarray(rotate(jnp.asarray(x), (jnp.cos(jnp.asarray(angles)), jnp.sin(jnp.asarray(angles)))))
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-6)


def test_rotating_keeps_the_dtype() -> None:
    cos_sin = rotation(RopeConfig("default", 10000.0, {}), 8, jnp.zeros((1, 1), jnp.int32))
    assert rotate(jnp.ones((1, 1, 2, 8), jnp.bfloat16), cos_sin).dtype == jnp.bfloat16


def test_prompts_past_the_trained_length_turn_slower() -> None:
    rope = RopeConfig("dynamic_ntk", 10000.0, {"original_max_position_embeddings": 16})
    lengths = [1, 16, 17, 32, 33, 64]
    cos, _ = rotation(rope, 8, jnp.full(6, 5, jnp.int32), jnp.asarray(lengths, jnp.int32))
    for row, alpha in enumerate([1, 1, 3, 3, 7, 7]):  # 2^ceil(log2(n / 16) + 1) - 1, at least 1
        expected, _ = rotation(RopeConfig("default", 10000.0 * alpha ** (8 / 6), {}), 8, jnp.asarray([5]))
        np.testing.assert_allclose(cos[row], expected[0], rtol=1e-6)


def test_queries_past_the_trained_length_grow_with_the_logarithm_of_their_position() -> None:
    scale = logn_scale(16, jnp.asarray([[0, 15, 16, 255]], jnp.int32))
    np.testing.assert_allclose(scale.ravel(), [1.0, 1.0, math.log(17, 16), 2.0], rtol=1e-6)


def test_the_rest_of_a_head_stays_as_it_is() -> None:
    x = jnp.arange(16, dtype=jnp.float32).reshape(1, 1, 1, 16)
    positions = jnp.full((1, 1), 3, jnp.int32)
    half = rotate(x, rotation(RopeConfig("default", 10000.0, {}, 0.5), 16, positions))
    np.testing.assert_array_equal(half[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(
        half[..., :8], rotate(x[..., :8], rotation(RopeConfig("default", 10000.0, {}), 8, positions))
    )
    np.testing.assert_array_equal(rotate(x, rotation(NO_ROPE, 16, positions)), x)
