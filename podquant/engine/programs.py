"""The compiled steps: one program for each bucket of shapes, over a mesh.

A step takes weights, cache and a few small host integers, and gives the next tokens; it never waits for the host.
Weights come in as a tuple in the order of `Model.leaves`, the cache and the last tokens are donated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from podquant.engine.sampling import Sampling, log_probabilities, sample
from podquant.model.attention import KVCache, Positions
from podquant.model.decoder import Decoder
from podquant.model.layout import CacheShape, Model
from podquant.model.rope import logn_scale, rotation

_REPLICATED = PartitionSpec()


class Row(NamedTuple):
    """What a step needs to know of one sequence, but for how it samples: see `pack_rows`.

    Attributes:
        slot: its row of the last tokens.
        start, length: the tokens of this step, by their positions.
        top_k, seed, wants_logprobs: see `Sampling`.
        prompt_length: tokens of its whole prompt, which rotations that depend on it need.
        pages: of its keys and values.
    """

    slot: int
    start: int
    length: int
    top_k: int
    seed: int
    wants_logprobs: bool
    prompt_length: int
    pages: Sequence[int]


NUM_INTS = len(Row._fields) - 1
"""Columns of `Rows.ints` in front of the page table."""


class Rows(NamedTuple):
    """The rows of a step, as the host packs them.

    Attributes:
        ints: int32 [B, NUM_INTS + W]: the fields of each `Row`, the page table last.
        floats: float32 [B, 3]: temperature, top_p, min_p.
    """

    ints: Any
    floats: Any


class Scores(NamedTuple):
    """Log-probabilities of a prompt's tokens: of the token after each position [B, T], and the top ones [B, T, n]."""

    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


@dataclass(frozen=True)
class Bucket:
    """One shape a step is compiled for.

    Attributes:
        batch: rows.
        length: tokens of each row; 1 for decode, which takes its tokens from the device.
        scores: also give the log-probabilities of the prompt.
    """

    batch: int
    length: int
    scores: bool = False

    @property
    def is_decode(self) -> bool:
        """Whether the tokens come from the device."""
        return self.length == 1


def lower_step(model: Model, shape: CacheShape, bucket: Bucket, num_top: int) -> jax.stages.Lowered:
    """Lower the step for one bucket; compile the result to run it.

    The program takes (weights, cache, last tokens, rows[, token ids [B, T][, target ids [B, T]]]) and returns (cache,
    last tokens, Sampled[, Scores]); it donates cache and last tokens.

    Args:
        model: the model.
        shape: of the cache.
        bucket: of the rows.
        num_top: how many of the most likely tokens are reported.
    """
    step = partial(_step, model, shape, num_top, bucket)
    weight_specs = tuple(sharding.spec for sharding in model.shardings)
    keys, values, last = model.cache_arrays(shape)
    cache_specs = KVCache(keys.sharding.spec, values.sharding.spec)
    inputs = _inputs(model, shape, bucket)
    mapped = jax.shard_map(
        step,
        mesh=model.mesh,
        in_specs=(weight_specs, cache_specs, *(_REPLICATED,) * (1 + len(inputs))),
        out_specs=(cache_specs, *(_REPLICATED,) * (3 if bucket.scores else 2)),
        check_vma=False,
    )
    weights = tuple(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(model.leaves, model.shardings, strict=True)
    )
    cache: Any = (keys, values)
    return jax.jit(mapped, donate_argnums=(1, 2)).lower(weights, KVCache(*cache), last, *inputs)


def _inputs(model: Model, shape: CacheShape, bucket: Bucket) -> tuple[Any, ...]:
    replicated = NamedSharding(model.mesh, _REPLICATED)

    def struct(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=replicated)

    rows = Rows(struct((bucket.batch, NUM_INTS + shape.table_width), jnp.int32), struct((bucket.batch, 3), jnp.float32))
    tokens = struct((bucket.batch, bucket.length), jnp.int32)
    return (rows, *(tokens,) * (0 if bucket.is_decode else 2 if bucket.scores else 1))


def _step(
    model: Model,
    shape: CacheShape,
    num_top: int,
    bucket: Bucket,
    weights: tuple[jax.Array, ...],
    cache: KVCache,
    last_tokens: jax.Array,
    rows: Rows,
    *given: jax.Array,
) -> tuple[Any, ...]:
    """One step on one shard; see `lower_step`."""
    decoder = model.decoder(weights)
    slots, starts, lengths, top_k, seeds, wants, prompts = (rows.ints[:, i] for i in range(NUM_INTS))  # as in Row
    tokens = last_tokens[slots][:, None] if bucket.is_decode else given[0]
    at = step_positions(model, shape, starts, lengths, prompts, rows.ints[:, NUM_INTS:], bucket.length)
    hidden, cache = decoder.hidden(tokens, cache, at)
    by_row = hidden.reshape(bucket.batch, bucket.length, -1)
    last = jnp.take_along_axis(by_row, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    temperature, top_p, min_p = (rows.floats[:, i] for i in range(3))
    how = Sampling(temperature, top_p, min_p, top_k, seeds, starts + lengths, wants > 0)
    sampled = sample(decoder.logits(last), how, model.config.vocab_size, num_top)
    last_tokens = last_tokens.at[slots].set(sampled.tokens)
    if not bucket.scores:
        return cache, last_tokens, sampled
    return cache, last_tokens, sampled, _scores(decoder, hidden, given[1], model.config.vocab_size, num_top)


def step_positions(
    model: Model,
    shape: CacheShape,
    starts: jax.Array,
    lengths: jax.Array,
    prompt_lengths: jax.Array,
    page_table: jax.Array,
    length: int,
) -> Positions:
    """Where the tokens of a step stand.

    Args:
        model: the model.
        shape: of the cache.
        starts, lengths: int32 [B], the first position of each row, and how many of its tokens count.
        prompt_lengths: int32 [B], of the whole prompts.
        page_table: int32 [B, W].
        length: T.
    """
    config = model.config
    offsets = jnp.arange(length, dtype=jnp.int32)[None, :]
    valid = offsets < lengths[:, None]
    positions = starts[:, None] + jnp.minimum(offsets, jnp.maximum(lengths - 1, 0)[:, None])
    pages = jnp.take_along_axis(page_table, positions // shape.page_size, axis=1)
    return Positions(
        positions=positions,
        page_table=page_table,
        write_pages=jnp.where(valid, pages, 0).reshape(-1),
        write_slots=jnp.where(valid, positions % shape.page_size, 0).reshape(-1),
        pages_per_layer=shape.num_pages,
        cos_sin=rotation(config.rope, config.head_dim, positions, prompt_lengths),
        other_cos_sin=tuple(rotation(rope, config.head_dim, positions, prompt_lengths) for rope in config.other_ropes),
        query_scale=None if config.logn_length is None else logn_scale(config.logn_length, positions),
    )


_SCORE_ROWS = 32
"""Positions whose logits exist at one time when a prompt is scored."""


def _scores(decoder: Decoder, hidden: jax.Array, targets: jax.Array, vocab_size: int, num_top: int) -> Scores:
    batch, length = targets.shape
    tile = min(_SCORE_ROWS, batch * length)

    def score(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        return log_probabilities(decoder.logits(pair[0]), pair[1], vocab_size, num_top)

    tiles = (hidden.reshape(-1, tile, hidden.shape[-1]), targets.reshape(-1, tile))
    logprobs, top_tokens, top_logprobs = jax.lax.map(score, tiles)
    shape = (batch, length, num_top)
    return Scores(logprobs.reshape(batch, length), top_tokens.reshape(shape), top_logprobs.reshape(shape))


def pack_rows(
    entries: Sequence[Row],
    floats: Sequence[tuple[float, float, float]],
    batch: int,
    shape: CacheShape,
) -> Rows:
    """Pack host values into the arrays of a step, padding up to `batch` rows.

    Args:
        entries: the sequences.
        floats: for each of them temperature, top_p, min_p.
        batch: rows of the bucket.
        shape: of the cache; padding rows use its extra slot.
    """
    ints: NDArray[np.int32] = np.zeros((batch, NUM_INTS + shape.table_width), np.int32)
    ints[:, 0] = shape.num_slots
    for row, (*head, pages) in enumerate(entries):
        ints[row, :NUM_INTS] = head
        ints[row, NUM_INTS : NUM_INTS + len(pages)] = pages
    packed: NDArray[np.float32] = np.zeros((batch, 3), np.float32)
    if floats:
        packed[: len(floats)] = floats
    return Rows(ints, packed)
