"""Which experts a token goes to, and with which weights; in float32. Knows nothing of what experts compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from podquant.families.config import MoEConfig

_TINY = 1e-20
"""Keeps a token whose scores are all zero from dividing by it."""


def route(logits: jax.Array, how: MoEConfig, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Choose experts.

    Args:
        logits: float32 [M, E], the router's.
        how: scores, groups and weights.
        bias: float32 [E], added to the scores for the choice alone (arXiv:2412.19437 §2.1.2); None for none.

    Returns:
        int32 [M, k], the experts of each token, the best first, and float32 [M, k], the weight of each.
    """
    scores = jax.nn.softmax(logits, axis=-1) if how.scoring == "softmax" else jax.nn.sigmoid(logits)
    ranked = scores if bias is None else scores + bias.reshape(1, -1)
    if how.num_groups > 1:
        ranked = _in_best_groups(ranked, how)
    _, experts = jax.lax.top_k(ranked, how.top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if how.normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + _TINY)
    return experts.astype(jnp.int32), weights * how.scaling


def _in_best_groups(ranked: jax.Array, how: MoEConfig) -> jax.Array:
    """[M, E], minus infinity for experts outside their token's best groups."""
    grouped = ranked.reshape(ranked.shape[0], how.num_groups, -1)
    best = grouped.max(axis=-1) if how.group_score == "max" else jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
    _, chosen = jax.lax.top_k(best, how.top_groups)
    group = jnp.arange(how.num_groups, dtype=chosen.dtype).reshape(1, 1, -1)
    inside = (chosen[:, :, None] == group).any(axis=1)
    return jnp.where(inside[:, :, None], grouped, -jnp.inf).reshape(ranked.shape)
