"""The compiled steps: one program for each bucket of shapes, over a mesh.

A step takes weights, cache and a few small host integers, and gives the next tokens; it never waits for the host.
Weights come in as a tuple in the order of `Model.leaves`, the cache and the slots are donated.
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
from podquant.engine.slots import NUM_ENDS, Adjustment, Slots, adjust, slot_arrays, tally_generated, tally_prompt
from podquant.model.attention import KVCache, Positions
from podquant.model.decoder import Decoder
from podquant.model.layout import CacheShape, Model
from podquant.model.rope import logn_scale, rotation

_REPLICATED = PartitionSpec()


class Row(NamedTuple):
    """What a step needs to know of one sequence, in whole numbers; on the devices of all rows, int32 [B] each.

    Attributes:
        slot: its row of `Slots`.
        start, length: the tokens of this step, by their positions.
        top_k, seed, wants_logprobs: see `Sampling`.
        prompt_length: tokens of its whole prompt, which rotations that depend on it need.
        is_tallied, forbids_ends: see `Adjustment`.
        pages: of its keys and values; on the devices the page table, int32 [B, W].
    """

    slot: Any
    start: Any
    length: Any
    top_k: Any
    seed: Any
    wants_logprobs: Any
    prompt_length: Any
    is_tallied: Any
    forbids_ends: Any
    pages: Any


NUM_INTS = len(Row._fields) - 1
"""Columns of `Rows.ints` in front of the page table."""


class Floats(NamedTuple):
    """By what one sequence samples, see `Sampling` and `Adjustment`; on the devices of all rows, float32 [B] each."""

    temperature: Any
    top_p: Any
    min_p: Any
    repetition: Any
    presence: Any
    frequency: Any


class Rows(NamedTuple):
    """The rows of a step, as the host packs them.

    Attributes:
        ints: int32 [B, NUM_INTS + W]: the fields of each `Row`, the page table last.
        floats: float32 [B, F]: the fields of each `Floats`.
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

    The program takes (weights, cache, slots, rows[, token ids [B, T], end ids [B, NUM_ENDS][, target ids [B, T]]]) and
    returns (cache, slots, Sampled[, Scores]); it donates cache and slots.

    Args:
        model: the model.
        shape: of the cache.
        bucket: of the rows.
        num_top: how many of the most likely tokens are reported.
    """
    step = partial(_step, model, shape, num_top, bucket)
    weight_specs = tuple(sharding.spec for sharding in model.shardings)
    keys, values = model.cache_arrays(shape)
    cache: Any = (keys, values)
    state = slot_arrays(model, shape)
    inputs = _inputs(model, shape, bucket)
    carried = jax.tree.map(lambda array: array.sharding.spec, (KVCache(*cache), state))
    mapped = jax.shard_map(
        step,
        mesh=model.mesh,
        in_specs=(weight_specs, *carried, *(_REPLICATED,) * len(inputs)),
        out_specs=(*carried, *(_REPLICATED,) * (2 if bucket.scores else 1)),
        check_vma=False,
    )
    weights = tuple(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(model.leaves, model.shardings, strict=True)
    )
    return jax.jit(mapped, donate_argnums=(1, 2)).lower(weights, KVCache(*cache), state, *inputs)


def _inputs(model: Model, shape: CacheShape, bucket: Bucket) -> tuple[Any, ...]:
    replicated = NamedSharding(model.mesh, _REPLICATED)

    def struct(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=replicated)

    batch = bucket.batch
    ints, floats = (batch, NUM_INTS + shape.table_width), (batch, len(Floats._fields))
    inputs: list[Any] = [Rows(struct(ints, jnp.int32), struct(floats, jnp.float32))]
    if not bucket.is_decode:
        inputs += [struct((batch, bucket.length), jnp.int32), struct((batch, NUM_ENDS), jnp.int32)]
    if bucket.scores:
        inputs.append(struct((batch, bucket.length), jnp.int32))
    return tuple(inputs)


def _step(
    model: Model,
    shape: CacheShape,
    num_top: int,
    bucket: Bucket,
    weights: tuple[jax.Array, ...],
    cache: KVCache,
    state: Slots,
    rows: Rows,
    *given: jax.Array,
) -> tuple[Any, ...]:
    """One step on one shard; see `lower_step`."""
    decoder = model.decoder(weights)
    row = Row._make([*(rows.ints[:, i] for i in range(NUM_INTS)), rows.ints[:, NUM_INTS:]])
    floats = Floats(*(rows.floats[:, i] for i in range(len(Floats._fields))))
    tokens = state.last_tokens[row.slot][:, None] if bucket.is_decode else given[0]
    at = step_positions(model, shape, row.start, row.length, row.prompt_length, row.pages, bucket.length)
    hidden, cache = decoder.hidden(tokens, cache, at)
    by_row = hidden.reshape(bucket.batch, bucket.length, -1)
    last = jnp.take_along_axis(by_row, jnp.maximum(row.length - 1, 0)[:, None, None], axis=1)[:, 0]
    logits = decoder.logits(last)
    adjusted, tallies = _adjusted(logits, state.tallies, row, floats, tokens, None if bucket.is_decode else given[1])
    how = Sampling(
        temperature=floats.temperature,
        top_p=floats.top_p,
        min_p=floats.min_p,
        top_k=row.top_k,
        seeds=row.seed,
        positions=row.start + row.length,
        wants_logprobs=row.wants_logprobs > 0,
        is_adjusted=row.is_tallied > 0,
    )
    sampled = sample(logits, adjusted, how, model.config.vocab_size, num_top)
    state = Slots(state.last_tokens.at[row.slot].set(sampled.tokens), tallies)
    if not bucket.scores:
        return cache, state, sampled
    return cache, state, sampled, _scores(decoder, hidden, given[2], model.config.vocab_size, num_top)


def _adjusted(
    logits: jax.Array,
    tallies: jax.Array,
    row: Row,
    floats: Floats,
    tokens: jax.Array,
    ends: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Logits to choose from, and the tallies with the tokens of this step; `ends` None for a decode step."""
    how = Adjustment(
        is_used=row.is_tallied > 0,
        forbids_ends=row.forbids_ends > 0,
        repetition=floats.repetition,
        presence=floats.presence,
        frequency=floats.frequency,
    )

    def tally_and_adjust(tallies: jax.Array) -> tuple[jax.Array, jax.Array]:
        if ends is None:
            tallies = tally_generated(tallies, row.slot, tokens[:, 0], how.is_used)
        else:
            offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
            positions = jnp.where(offsets < row.length[:, None], row.start[:, None] + offsets, -1)
            tallies = tally_prompt(tallies, row.slot, tokens, positions, row.prompt_length, ends, how.is_used)
        return adjust(logits, tallies[row.slot], how), tallies

    adjusted, tallies = jax.lax.cond(jnp.any(how.is_used), tally_and_adjust, lambda tallies: (logits, tallies), tallies)
    return adjusted, tallies


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
    floats: Sequence[Floats],
    batch: int,
    shape: CacheShape,
) -> Rows:
    """Pack host values into the arrays of a step, padding up to `batch` rows.

    Args:
        entries: the sequences.
        floats: for each of them.
        batch: rows of the bucket.
        shape: of the cache; padding rows use its extra slot.
    """
    ints: NDArray[np.int32] = np.zeros((batch, NUM_INTS + shape.table_width), np.int32)
    ints[:, 0] = shape.num_slots
    for row, (*head, pages) in enumerate(entries):
        ints[row, :NUM_INTS] = head
        ints[row, NUM_INTS : NUM_INTS + len(pages)] = pages
    packed: NDArray[np.float32] = np.zeros((batch, len(Floats._fields)), np.float32)
    if floats:
        packed[: len(floats)] = floats
    return Rows(ints, packed)
