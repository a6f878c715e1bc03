"""Rotary embeddings against values transformers gives (tests/data/rope.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from podquant.model.config import ConfigReader, RopeConfig, read_rope
from podquant.model.rope import inverse_frequencies, rotate, rotation

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
