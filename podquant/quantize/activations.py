"""Activations to codes and scales, on the device, per token. Knows nothing of weights, meshes or models.

    s[t] = max_i |x[t, i]| / qmax       in float32; 1 for an all-zero token, at least the smallest normal float32
    q    = clip(round_half_even(x / s), -127, 127)   or   cast(clip(x / s, -448, 448))

Unlike those of weights, these bits are not defined to the last place: XLA may divide by a multiply. A token that holds
NaN or Inf gets a scale that is not finite, so the fault shows in the output and is not hidden in the codes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from podquant.dtypes import BY_NAME, QUANTIZED_DTYPES

_SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)

LOW_STEPS = 254.0
"""Steps of one part of `split_int8` per step of the part before it: half a step is then 127 of the next."""


def quantize_per_token(x: jax.Array, dtype: str, absmax: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Quantize each token by its own largest magnitude: `x ≈ codes · scale`.

    Args:
        x: bfloat16 or float32, `[..., D]`.
        dtype: `int8` or `float8_e4m3fn`.
        absmax: float32 `[..., 1]`, each token's largest magnitude, where x is only a part of the token; None: x's own.

    Returns:
        codes `[..., D]` of that type, and scale, float32 `[..., 1]`.
    """
    if dtype not in QUANTIZED_DTYPES:
        raise ValueError(f"activation dtype {dtype!r}: expected one of {', '.join(QUANTIZED_DTYPES)}")
    target = BY_NAME[dtype]
    assert target.qmax is not None
    values = x.astype(jnp.float32)
    scale = _scale(token_absmax(values) if absmax is None else absmax, target.qmax)
    ratio = values / scale
    if dtype == "int8":
        ratio = jnp.round(ratio)
    return jnp.clip(ratio, -target.qmax, target.qmax).astype(target.numpy), scale


def split_int8(x: jax.Array, parts: int = 2) -> tuple[jax.Array, ...]:
    """Split each token into int8 parts: `x ≈ scale · Σ part[i] / 254^i`, two within 1.6e-5 of the token's maximum.

    For weight-only int8 where the fast matmul is int8 by int8 (XLA:CPU): two int8 matmuls, stacked as one of twice the
    rows, are closer to the exact product than one in bfloat16, and faster. Three are as close as one in float32.

    Args:
        x: bfloat16 or float32, `[..., D]`.
        parts: how many.

    Returns:
        The parts, int8 `[..., D]`, the largest first, and scale, float32 `[..., 1]`.
    """
    values = x.astype(jnp.float32)
    scale = _scale(token_absmax(values), 127.0)
    left, codes = values / scale, []
    for _ in range(parts):
        rounded = jnp.clip(jnp.round(left), -127.0, 127.0)
        codes.append(rounded.astype(jnp.int8))
        left = (left - rounded) * LOW_STEPS
    return *codes, scale


def token_absmax(x: jax.Array) -> jax.Array:
    """The largest magnitude of each token of `[..., D]`: float32 `[..., 1]`."""
    return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)


def _scale(absmax: jax.Array, qmax: float) -> jax.Array:
    return jnp.where(absmax == 0.0, 1.0, jnp.maximum(absmax / qmax, _SMALLEST_NORMAL))
