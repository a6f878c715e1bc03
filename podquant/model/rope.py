"""Rotary position embedding (arXiv:2104.09864) with the extensions of Llama 3 and YaRN (arXiv:2309.00071)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from podquant.families.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[NDArray[np.float32], float]:
    """Radians per position for each pair of dimensions, and the factor on sine and cosine.

    Args:
        rope: the kind and its parameters.
        head_dim: H, even.

    Returns:
        [R/2] float32 for the R dimensions that turn, and the attention factor (1.0 but for YaRN).
    """
    head_dim = int(head_dim * rope.rotated)
    base = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        return (base / rope.parameters["factor"]).astype(np.float32), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, base).astype(np.float32), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, base, head_dim).astype(np.float32), _yarn_attention_factor(rope)
    return (base * (rope.kind != "none")).astype(np.float32), 1.0


def _llama3(rope: RopeConfig, base: NDArray[np.float64]) -> NDArray[np.float64]:
    """Wavelengths beyond the original context are stretched by `factor`; between the two bounds, by interpolation."""
    low, high = rope.parameters["low_freq_factor"], rope.parameters["high_freq_factor"]
    original = rope.parameters["original_max_position_embeddings"]
    wavelength = 2 * math.pi / base
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return np.asarray((1 - smooth) * base / rope.parameters["factor"] + smooth * base)


def _yarn(rope: RopeConfig, base: NDArray[np.float64], head_dim: int) -> NDArray[np.float64]:
    """NTK-by-parts: dimensions that turn often keep their frequency, those that turn little are interpolated."""
    original = rope.parameters["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension(rope.parameters.get("beta_fast", 32))
    high = dimension(rope.parameters.get("beta_slow", 1))
    if rope.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return np.asarray(base / rope.parameters["factor"] * ramp + base * (1 - ramp))


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if "attention_factor" in rope.parameters:
        return float(rope.parameters["attention_factor"])

    def mscale(weight: float) -> float:
        factor = rope.parameters["factor"]
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    numerator, denominator = rope.parameters.get("mscale"), rope.parameters.get("mscale_all_dim")
    if numerator and denominator:
        return mscale(numerator) / mscale(denominator)
    return mscale(1.0)


def rotation(
    rope: RopeConfig, head_dim: int, positions: jax.Array, prompt_lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 [..., 1, R/2], for int32 positions [...]; computed once a step for all layers.

    Args:
        rope: the kind and its parameters.
        head_dim: H.
        positions: of the tokens.
        prompt_lengths: of each token's whole prompt, int32 as `positions`; only `dynamic_ntk` needs them.
    """
    if rope.kind == "dynamic_ntk":
        assert prompt_lengths is not None
        table, bounds = dynamic_ntk(rope, head_dim)
        bounds = bounds.reshape((1,) * positions.ndim + (-1,))
        row = (prompt_lengths[..., None] > jnp.asarray(bounds)).sum(axis=-1, dtype=jnp.int32)
        angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(table)[row][..., None, :]
        return jnp.cos(angles), jnp.sin(angles)
    frequencies, factor = inverse_frequencies(rope, head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies).reshape(
        (1,) * (positions.ndim + 1) + (-1,)
    )
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def dynamic_ntk(rope: RopeConfig, head_dim: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """First-generation Qwen's rotation of prompts longer than the L tokens that it was trained on.

    A prompt of n tokens, and what is generated after it, turns with the base theta * a^(H / (H - 2)), where
    a = max(1, 2^ceil(log2(n / L) + 1) - 1) (`modeling_qwen.py` of Qwen-7B-Chat, `get_ntk_alpha`).

    Returns:
        [J, H/2] float32 inverse frequencies, and J - 1 lengths: row j is for prompts longer than the first j of them.
    """
    length = int(rope.parameters["original_max_position_embeddings"])
    bounds = [length << j for j in range(16) if length << j < 1 << 30]
    rows = [
        inverse_frequencies(
            RopeConfig("default", rope.theta * (2.0 ** (j + 1) - 1) ** (head_dim / (head_dim - 2)), {}), head_dim
        )[0]
        for j in range(len(bounds) + 1)
    ]
    return np.stack(rows), np.asarray(bounds, np.int32)


def logn_scale(length: int, positions: jax.Array) -> jax.Array:
    """max(1, log(position + 1) / log(length)), float32 [..., 1, 1]: what log-n attention multiplies queries by."""
    counted = jnp.maximum(positions + 1, length)[..., None, None].astype(jnp.float32)
    return jnp.log(counted) / math.log(length)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate heads [..., heads, H], the two halves of what turns as the pairs (the layout of Hugging Face checkpoints).

    The first R dimensions turn, where cosine and sine are R/2 wide.
    """
    cos, sin = cos_sin
    half = cos.shape[-1]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if 2 * half == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)
