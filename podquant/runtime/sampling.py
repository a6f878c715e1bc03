"""Choosing the next token on the devices, from logits whose vocabulary is shared out among the shards.

No shard ever holds all logits: what crosses shards is one candidate a shard, and a few sums. top-k and top-p are exact: their
thresholds are found by bisection over the bits of the logits, without a sort.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from podquant.model.axes import TP


class Sampling(NamedTuple):
    """How each row chooses; arrays of length B.

    Attributes:
        temperature: float32, 0 for greedy.
        top_p, min_p: float32.
        top_k: int32, 0 for all.
        seeds: int32; with `positions` they make the randomness of a row, whatever else is in the batch.
        positions: int32, of the token being chosen.
        wants_logprobs: bool.
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    top_k: jax.Array
    seeds: jax.Array
    positions: jax.Array
    wants_logprobs: jax.Array


class Sampled(NamedTuple):
    """The tokens chosen, int32 [B], and log-probabilities: of them, float32 [B], and of the top ones, [B, n]."""

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


def sample(logits: jax.Array, how: Sampling, vocab_size: int, num_top: int) -> Sampled:
    """Choose a token for each row.

    Args:
        logits: this shard's [B, V / tp] float32.
        how: see `Sampling`.
        vocab_size: the true V; columns from there on are padding.
        num_top: n, how many of the most likely tokens to report for rows that want log-probabilities.

    Returns:
        The same on every shard.
    """
    token_ids = _token_ids(logits)
    logits = jnp.where(token_ids[None, :] < vocab_size, logits, -jnp.inf)
    random = how.temperature > 0.0
    scores = jax.lax.cond(jnp.any(random), lambda: _perturbed(logits, how), lambda: logits)
    tokens = _argmax(jnp.where(random[:, None], scores, logits), token_ids)
    batch = logits.shape[0]
    logprobs, top_tokens, top_logprobs = jax.lax.cond(
        jnp.any(how.wants_logprobs),
        lambda: log_probabilities(logits, tokens, num_top),
        lambda: (
            jnp.zeros((batch,), jnp.float32),
            jnp.zeros((batch, num_top), jnp.int32),
            jnp.zeros((batch, num_top), jnp.float32),
        ),
    )
    return Sampled(tokens, logprobs, top_tokens, top_logprobs)


def log_probabilities(logits: jax.Array, tokens: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities under softmax(logits), natural logarithm.

    Args:
        logits: this shard's [B, V / tp] float32, padding at -inf.
        tokens: int32 [B].
        num_top: n.

    Returns:
        Of `tokens` [B]; ids [B, n] and log-probabilities [B, n] of the most likely, best first.
    """
    token_ids = _token_ids(logits)
    best = logits.max(axis=-1)
    own = jnp.where(token_ids[None, :] == tokens[:, None], logits, -jnp.inf).max(axis=-1)
    count = min(num_top, logits.shape[1])
    top, index = jax.lax.top_k(logits, count)
    total = jnp.exp(logits - best[:, None]).sum(axis=-1)
    best, total, own, top, index = jax.lax.all_gather((best, total, own, top, token_ids[index]), TP)
    peak = best.max(axis=0)
    normalizer = peak + jnp.log((total * jnp.exp(best - peak[None, :])).sum(axis=0))
    merged = top.transpose(1, 0, 2).reshape(top.shape[1], -1)
    merged_ids = index.transpose(1, 0, 2).reshape(top.shape[1], -1)
    top, order = jax.lax.top_k(merged, min(num_top, merged.shape[1]))
    ids = jnp.take_along_axis(merged_ids, order, axis=1)
    pad = ((0, 0), (0, num_top - top.shape[1]))
    top_logprobs = jnp.pad(top - normalizer[:, None], pad, constant_values=-jnp.inf)
    return own.max(axis=0) - normalizer, jnp.pad(ids, pad), top_logprobs


def _token_ids(logits: jax.Array) -> jax.Array:
    width = logits.shape[1]
    return jax.lax.axis_index(TP) * width + jnp.arange(width, dtype=jnp.int32)


def _argmax(scores: jax.Array, token_ids: jax.Array) -> jax.Array:
    """The best-scored token of each row over all shards; the lowest id among equals."""
    local = jnp.argmax(scores, axis=-1)
    best, ids = jax.lax.all_gather((scores.max(axis=-1), token_ids[local]), TP)  # [tp, B]
    return jnp.take_along_axis(ids, jnp.argmax(best, axis=0)[None, :], axis=0)[0]


def _perturbed(logits: jax.Array, how: Sampling) -> jax.Array:
    """Filtered logits plus Gumbel noise: their argmax is a draw from the filtered distribution."""
    scaled = logits / jnp.where(how.temperature > 0.0, how.temperature, 1.0)[:, None]
    filtered = (how.top_k > 0) | (how.top_p < 1.0) | (how.min_p > 0.0)
    scaled = jax.lax.cond(jnp.any(filtered), lambda: _filter(scaled, how), lambda: scaled)
    width = logits.shape[1]
    total = width * jax.lax.axis_size(TP)

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        # One stream over the whole vocabulary, of which each shard takes its part: the same draw at any tp_size.
        return jax.lax.dynamic_slice_in_dim(
            jax.random.gumbel(key, (total,), jnp.float32), jax.lax.axis_index(TP) * width, width
        )

    return scaled + jax.vmap(noise)(how.seeds, how.positions)


def _filter(logits: jax.Array, how: Sampling) -> jax.Array:
    """Set what top_k, then top_p, then min_p leave out to -inf."""
    order = _ordered_bits(logits)
    best = jax.lax.pmax(logits.max(axis=-1, keepdims=True), TP)
    weights = jnp.exp(logits - best)
    keep = order >= _threshold(order, jnp.ones_like(weights), how.top_k.astype(jnp.float32), how.top_k > 0)[:, None]
    weights = jnp.where(keep, weights, 0.0)
    mass = how.top_p * jax.lax.psum(weights.sum(axis=-1), TP)
    keep &= order >= _threshold(order, weights, mass, how.top_p < 1.0)[:, None]
    keep &= weights >= how.min_p[:, None]
    return jnp.where(keep, logits, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 that compare as the float32 do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order: jax.Array, weights: jax.Array, target: jax.Array, active: jax.Array) -> jax.Array:
    """For each row the largest bits t with sum(weights where order >= t) >= target: uint32 [B], 0 if not active."""

    def body(step: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
        mass = jnp.where(order >= candidate[:, None], weights, 0.0).sum(axis=-1)
        return jnp.where(jax.lax.psum(mass, TP) >= target, candidate, found)

    found = jax.lax.fori_loop(0, 32, body, jnp.zeros(order.shape[0], jnp.uint32))
    return jnp.where(active, found, jnp.uint32(0))
