"""The compiled step, over a mesh: one flat batch of tokens, those of prompts beside those of running sequences.

It takes weights, cache and a few small host integers, and gives the next tokens; it never waits for the host. There is
one program for each bucket of tokens. Weights come in as a tuple in the order of `Model.leaves`, the cache and the
slots are donated.
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
from podquant.engine.slots import NUM_ENDS, Adjustment, Slots, adjust, slot_arrays, tally
from podquant.model.batch import Batch, flat_batch
from podquant.model.decoder import Decoder
from podquant.model.kv_cache import Cache
from podquant.model.layout import CacheShape, Model

_REPLICATED = PartitionSpec()


class Row(NamedTuple):
    """What a step needs to know of one sequence, in whole numbers; on the devices of all rows, int32 [R] each.

    Attributes:
        slot: its row of `Slots`.
        start, length: the tokens of this step, by their positions.
        top_k, seed, wants_logprobs: see `Sampling`.
        prompt_length: tokens of its whole prompt, which rotations that depend on it need.
        is_tallied, forbids_ends: see `Adjustment`.
        num_sampled: tokens that are sampled, behind each of so many of its last ones; 0 for none.
        pages: of its keys and values; on the devices the page table, int32 [R, W].
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
    num_sampled: Any
    pages: Any


NUM_INTS = len(Row._fields) - 1
"""Columns of `Inputs.rows` in front of the page table."""

FROM_DEVICE = -1
"""In place of a token id: the last token of the sequence, which the devices have and the host may not know yet."""


class Floats(NamedTuple):
    """By what one sequence samples, see `Sampling` and `Adjustment`; on the devices of all rows, float32 [R] each."""

    temperature: Any
    top_p: Any
    min_p: Any
    repetition: Any
    presence: Any
    frequency: Any


class Inputs(NamedTuple):
    """What the host tells the devices of a step: R rows, those of one token first, and T tokens.

    Packed it has what there is; `pad_inputs` fills it up to the sizes of a program.

    Attributes:
        rows: int32 [R, NUM_INTS + W]: the fields of each `Row`, the page table last.
        floats: float32 [R, F]: the fields of each `Floats`.
        tokens: int32 [T], row by row; or `FROM_DEVICE`.
        ends: int32 [E, 2], rows and tokens that would end their output; see `slots.tally`.
        targets: int32 [T], the token after each, whose log-probabilities are wanted, -1 for none; None where the step
            scores nothing.
    """

    rows: Any
    floats: Any
    tokens: Any
    ends: Any
    targets: Any = None


class Scores(NamedTuple):
    """Log-probabilities of a prompt's tokens: of the token after each position [T], and the top ones [T, n]."""

    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


@dataclass(frozen=True)
class Bucket:
    """One shape a step is compiled for.

    Attributes:
        num_tokens: T.
        scores: also give the log-probabilities of prompts.
    """

    num_tokens: int
    scores: bool = False

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens" + (", scored" if self.scores else "")

    def num_rows(self, shape: CacheShape) -> int:
        """R: a row has a token at least, and a slot."""
        return min(self.num_tokens, shape.num_slots)

    def num_sampled(self, shape: CacheShape) -> int:
        """S: tokens that are sampled at the most."""
        return min(self.num_tokens, shape.num_slots * (1 + shape.num_drafts))


def lower_step(model: Model, shape: CacheShape, bucket: Bucket, num_top: int) -> jax.stages.Lowered:
    """Lower the step for one bucket; compile the result to run it.

    The program takes (weights, cache, slots, `Inputs`) and returns (cache, slots, Sampled[, Scores]), of each pick and
    token; it donates cache and slots.

    Args:
        model: the model.
        shape: of the cache.
        bucket: of the tokens.
        num_top: how many of the most likely tokens are reported.
    """
    step = partial(_step, model, shape, num_top, bucket)
    carried = (model.cache_arrays(shape), slot_arrays(model, shape))
    inputs = _inputs(model, shape, bucket)
    carried_specs = jax.tree.map(lambda array: array.sharding.spec, carried)
    mapped = jax.shard_map(
        step,
        mesh=model.mesh,
        in_specs=(tuple(sharding.spec for sharding in model.shardings), *carried_specs, _REPLICATED),
        out_specs=(*carried_specs, *(_REPLICATED,) * (2 if bucket.scores else 1)),
        check_vma=False,
    )
    weights = tuple(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(model.leaves, model.shardings, strict=True)
    )
    return jax.jit(mapped, donate_argnums=(1, 2)).lower(weights, *carried, inputs)


def _inputs(model: Model, shape: CacheShape, bucket: Bucket) -> Inputs:
    replicated = NamedSharding(model.mesh, _REPLICATED)

    def struct(dims: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=replicated)

    num_rows, num_tokens = bucket.num_rows(shape), bucket.num_tokens
    return Inputs(
        rows=struct((num_rows, NUM_INTS + shape.table_width)),
        floats=struct((num_rows, len(Floats._fields)), jnp.float32),
        tokens=struct((num_tokens,)),
        ends=struct((NUM_ENDS, 2)),
        targets=struct((num_tokens,)) if bucket.scores else None,
    )


def _step(
    model: Model,
    shape: CacheShape,
    num_top: int,
    bucket: Bucket,
    weights: tuple[jax.Array, ...],
    cache: Cache,
    state: Slots,
    inputs: Inputs,
) -> tuple[Any, ...]:
    """One step on one shard; see `lower_step`."""
    config, decoder = model.config, model.decoder(weights)
    row = Row._make([*(inputs.rows[:, i] for i in range(NUM_INTS)), inputs.rows[:, NUM_INTS:]])
    floats = Floats(*(inputs.floats[:, i] for i in range(len(Floats._fields))))
    at = flat_batch(
        config,
        bucket.num_tokens,
        row.start,
        row.length,
        row.prompt_length,
        row.pages,
        page_size=shape.page_size,
        pages_per_layer=shape.num_pages,
    )
    tokens = jnp.where(inputs.tokens == FROM_DEVICE, state.last_tokens[row.slot[at.rows]], inputs.tokens)
    hidden, cache = decoder.hidden(tokens, cache, at)
    picks = _pick(bucket.num_sampled(shape), row, at)
    logits = decoder.logits(hidden[picks.token])
    adjusted, tallies = _adjusted(logits, picks, state.tallies, row, floats, tokens, at, inputs.ends)
    drawn = Floats(*(each[picks.row] for each in floats))
    how = Sampling(
        temperature=drawn.temperature,
        top_p=drawn.top_p,
        min_p=drawn.min_p,
        top_k=row.top_k[picks.row],
        seeds=row.seed[picks.row],
        positions=at.positions[picks.token] + 1,
        wants_logprobs=row.wants_logprobs[picks.row] > 0,
        is_adjusted=row.is_tallied[picks.row] > 0,
    )
    sampled = sample(logits, adjusted, how, config.vocab_size, num_top)
    slots = jnp.where(picks.is_one, row.slot[picks.row], shape.num_slots)
    state = Slots(state.last_tokens.at[slots].set(sampled.tokens), tallies)
    if not bucket.scores:
        return cache, state, sampled
    return cache, state, sampled, _scores(decoder, hidden, inputs.targets, config.vocab_size, num_top)


class _Picks(NamedTuple):
    """The tokens behind which one is sampled: int32 [S] their rows and indices in the batch, and bool, no padding."""

    row: jax.Array
    token: jax.Array
    is_one: jax.Array


def _pick(num_sampled: int, row: Row, at: Batch) -> _Picks:
    ends = jnp.cumsum(row.num_sampled)
    index = jnp.arange(num_sampled, dtype=jnp.int32)
    rows = jnp.minimum((ends[None, :] <= index[:, None]).sum(axis=1, dtype=jnp.int32), len(ends) - 1)
    token = at.firsts[rows] + at.lengths[rows] - (ends[rows] - index)
    is_one = index < ends[-1]
    return _Picks(rows, jnp.where(is_one, token, 0), is_one)


def _adjusted(
    logits: jax.Array,
    picks: _Picks,
    tallies: jax.Array,
    row: Row,
    floats: Floats,
    tokens: jax.Array,
    at: Batch,
    ends: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Logits to choose from, and the tallies with the tokens of this step."""
    how = Adjustment(
        is_used=row.is_tallied > 0,
        forbids_ends=row.forbids_ends > 0,
        repetition=floats.repetition,
        presence=floats.presence,
        frequency=floats.frequency,
    )

    def tally_and_adjust(tallies: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions = jnp.where(at.is_token, at.positions, -1)
        tallies = tally(tallies, row.slot, row.start, row.prompt_length, how.is_used, tokens, positions, at.rows, ends)
        picked = Adjustment(*(each[picks.row] for each in how))
        return adjust(logits, tallies[row.slot[picks.row]], picked), tallies

    adjusted, tallies = jax.lax.cond(jnp.any(how.is_used), tally_and_adjust, lambda tallies: (logits, tallies), tallies)
    return adjusted, tallies


_SCORE_ROWS = 32
"""Positions whose logits exist at one time when a prompt is scored."""


def _scores(decoder: Decoder, hidden: jax.Array, targets: jax.Array, vocab_size: int, num_top: int) -> Scores:
    tile = min(_SCORE_ROWS, len(targets))

    def score(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        return log_probabilities(decoder.logits(pair[0]), pair[1], vocab_size, num_top)

    found = jax.lax.map(score, (hidden.reshape(-1, tile, hidden.shape[-1]), targets.reshape(-1, tile)))
    return Scores(*(each.reshape(-1, *each.shape[2:]) for each in found))


def pack_rows(entries: Sequence[Row], floats: Sequence[Floats]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """`Inputs.rows` and `Inputs.floats` of these sequences, packed."""
    width = max((len(entry.pages) for entry in entries), default=0)
    ints: NDArray[np.int32] = np.zeros((len(entries), NUM_INTS + width), np.int32)
    for row, (*head, pages) in enumerate(entries):
        ints[row, :NUM_INTS] = head
        ints[row, NUM_INTS : NUM_INTS + len(pages)] = pages
    return ints, np.asarray(floats, np.float32).reshape(-1, len(Floats._fields))


def pad_inputs(packed: Inputs, bucket: Bucket, shape: CacheShape) -> Inputs:
    """Fill up to a program's sizes; rows of padding have no tokens, and use the cache's extra slot.

    Raises:
        ValueError: there is more than the program takes, or an array of the wrong rank.
    """
    num_rows, num_tokens = bucket.num_rows(shape), bucket.num_tokens

    def padded(array: Any, shape: tuple[int, ...], value: int = 0) -> Any:
        missing = [size - have for size, have in zip(shape, array.shape, strict=True)]
        return np.pad(array, [(0, each) for each in missing], constant_values=value)

    rows = padded(packed.rows, (num_rows, NUM_INTS + shape.table_width))
    rows[len(packed.rows) :, 0] = shape.num_slots
    return Inputs(
        rows=rows,
        floats=padded(packed.floats, (num_rows, len(Floats._fields))),
        tokens=padded(packed.tokens, (num_tokens,)),
        ends=padded(packed.ends, (NUM_ENDS, 2), -1),
        targets=None if packed.targets is None else padded(packed.targets, (num_tokens,), -1),
    )


def step_sizes(platform: str, most: int) -> list[int]:
    """Tokens of each program's step, the largest last.

    A CPU computes as long as there are tokens, padding included: every power of two. On other devices a step of few
    tokens takes as long as the weights take to be read: few sizes, so few programs.

    Args:
        platform: the JAX platform.
        most: tokens of the largest step.
    """
    size, factor = (1, 2) if platform == "cpu" else (16, 4)
    sizes = []
    while size < most:
        sizes.append(size)
        size *= factor
    return [*sizes, most]
