"""Choosing the next token on the devices, from logits whose vocabulary is shared out among the shards.

Two collectives in a step, whatever the rows ask for: one turns the shards' columns of all rows into all columns of a
few rows each, one gives every shard the tokens chosen. Between them a shard works on its own rows alone. top-k and
top-p are exact: their thresholds are found by bisection over the bits of the logits, without a sort.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from podquant.model.axes import TP

_GREEDY_TEMPERATURE = 1e-5
"""Below it a draw is greedy: noise would only choose among logits that differ by less than a float32 holds."""

_GREEDY_TOP_P = 1e-6
"""Up to it the most likely token alone has that much, in a vocabulary of up to a million."""


class Sampling(NamedTuple):
    """How each row chooses; arrays of length B.

    Attributes:
        temperature, top_p: float32; next to 0 either is greedy.
        min_p: float32.
        top_k: int32, 0 for all.
        seeds: int32; with `positions` they make the randomness of a row, whatever else is in the batch.
        positions: int32, of the token being chosen.
        wants_logprobs: bool.
        is_adjusted: bool, whether the logits to choose from are others than those to report.
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    top_k: jax.Array
    seeds: jax.Array
    positions: jax.Array
    wants_logprobs: jax.Array
    is_adjusted: jax.Array


class Sampled(NamedTuple):
    """The tokens chosen, int32 [B], and log-probabilities: of them, float32 [B], and of the top ones, [B, n]."""

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


def sample(logits: jax.Array, adjusted: jax.Array, how: Sampling, vocab_size: int, num_top: int) -> Sampled:
    """Choose a token for each row.

    Args:
        logits: this shard's [B, V / tp] float32; log-probabilities are of these.
        adjusted: to choose from, of the same shape; `logits` for rows that are not `is_adjusted`.
        how: see `Sampling`.
        vocab_size: the true V; columns from there on are padding.
        num_top: n, how many of the most likely tokens to report for rows that want log-probabilities.

    Returns:
        The same on every shard.
    """
    both = jnp.any(how.is_adjusted & how.wants_logprobs)
    rows, raw = jax.lax.cond(both, lambda: _spread_two(adjusted, logits), lambda: (_spread(adjusted),) * 2)
    rows, raw = rows[:, :vocab_size], raw[:, :vocab_size]
    mine = jax.tree.map(_own, how)
    random = (mine.temperature >= _GREEDY_TEMPERATURE) & (mine.top_p > _GREEDY_TOP_P)
    scores = jax.lax.cond(jnp.any(random), lambda: _perturbed(rows, mine), lambda: rows)
    tokens = jnp.argmax(jnp.where(random[:, None], scores, rows), axis=-1).astype(jnp.int32)
    count = rows.shape[0]
    logprobs, top_tokens, top_logprobs = jax.lax.cond(
        jnp.any(mine.wants_logprobs),
        lambda: _log_probabilities(raw, tokens, num_top),
        lambda: (
            jnp.zeros((count,), jnp.float32),
            jnp.zeros((count, num_top), jnp.int32),
            jnp.zeros((count, num_top), jnp.float32),
        ),
    )
    return Sampled(*_collect(logits.shape[0], tokens, logprobs, top_tokens, top_logprobs))


def log_probabilities(
    logits: jax.Array, tokens: jax.Array, vocab_size: int, num_top: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities under softmax(logits), natural logarithm.

    Args:
        logits: this shard's [B, V / tp] float32.
        tokens: int32 [B].
        vocab_size: the true V; columns from there on are padding.
        num_top: n.

    Returns:
        Of `tokens` [B]; ids [B, n] and log-probabilities [B, n] of the most likely, best first; the same on every
        shard.
    """
    found = _log_probabilities(_spread(logits)[:, :vocab_size], _own(tokens), num_top)
    logprobs, top_tokens, top_logprobs = _collect(logits.shape[0], *found)
    return logprobs, top_tokens, top_logprobs


def _log_probabilities(rows: jax.Array, tokens: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    normalizer = jax.nn.logsumexp(rows, axis=-1, keepdims=True)
    own = jnp.take_along_axis(rows, tokens[:, None], axis=1)
    top, ids = jax.lax.top_k(rows, min(num_top, rows.shape[1]))
    pad = ((0, 0), (0, num_top - top.shape[1]))
    top_logprobs = jnp.pad(top - normalizer, pad, constant_values=-jnp.inf)
    return (own - normalizer)[:, 0], jnp.pad(ids, pad), top_logprobs


def _spread(logits: jax.Array) -> jax.Array:
    """From all rows of this shard's columns [B, V / tp] to all columns of this shard's rows [ceil(B / tp), V]."""
    padding = -logits.shape[0] % jax.lax.axis_size(TP)
    padded = jnp.pad(logits, ((0, padding), (0, 0)))
    rows: jax.Array = jax.lax.all_to_all(padded, TP, split_axis=0, concat_axis=1, tiled=True)
    return rows


def _spread_two(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_spread` of both, in one collective."""
    width = first.shape[1]
    rows = _spread(jnp.concatenate([first, second], axis=1)).reshape(-1, jax.lax.axis_size(TP), 2, width)
    return rows[:, :, 0].reshape(len(rows), -1), rows[:, :, 1].reshape(len(rows), -1)


def _own(values: jax.Array) -> jax.Array:
    """This shard's rows [ceil(B / tp)] of values [B] that every shard has; rows from B on are zero."""
    shards = jax.lax.axis_size(TP)
    values = jnp.pad(values, (0, -values.shape[0] % shards)).reshape(shards, -1)
    return values[jax.lax.axis_index(TP)]


def _collect(batch: int, *parts: jax.Array) -> list[jax.Array]:
    """From this shard's rows of each part to all `batch` rows, on every shard; parts are of 32 bits an element."""
    columns = [jax.lax.bitcast_convert_type(part.reshape(part.shape[0], -1), jnp.int32) for part in parts]
    words = jax.lax.all_gather(jnp.concatenate(columns, axis=1), TP, tiled=True)[:batch]
    collected, start = [], 0
    for part, column in zip(parts, columns, strict=True):
        values = jax.lax.bitcast_convert_type(words[:, start : start + column.shape[1]], part.dtype)
        collected.append(values.reshape(batch, *part.shape[1:]))
        start += column.shape[1]
    return collected


def _perturbed(logits: jax.Array, how: Sampling) -> jax.Array:
    """Filtered logits plus Gumbel noise: their argmax is a draw from the filtered distribution."""
    # from the best downwards, so that whatever the temperature what is near it keeps its digits, and nothing overflows
    below = logits - logits.max(axis=-1, keepdims=True)
    scaled = below / jnp.maximum(how.temperature, _GREEDY_TEMPERATURE)[:, None]
    filtered = (how.top_k > 0) | (how.top_p < 1.0) | (how.min_p > 0.0)
    scaled = jax.lax.cond(jnp.any(filtered), lambda: _filter(scaled, how), lambda: scaled)
    width = logits.shape[1]

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (width,), jnp.float32)

    perturbed: jax.Array = scaled + jax.vmap(noise)(how.seeds, how.positions)
    return perturbed


def _filter(logits: jax.Array, how: Sampling) -> jax.Array:
    """Set what top_k, then top_p, then min_p leave out to -inf."""
    order = _ordered_bits(logits)
    best = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - best)
    keep = order >= _threshold(order, jnp.ones_like(weights), how.top_k.astype(jnp.float32), how.top_k > 0)[:, None]
    weights = jnp.where(keep, weights, 0.0)
    mass = how.top_p * weights.sum(axis=-1)
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
        return jnp.where(mass >= target, candidate, found)

    found = jax.lax.fori_loop(0, 32, body, jnp.zeros(order.shape[0], jnp.uint32))
    return jnp.where(active, found, jnp.uint32(0))
