"""What the devices keep of each running sequence beside its keys and values: its last token, and a tally by token.

The tally says how often each token was generated, whether it stands in the prompt, and whether it would end the output.
It is cut along the vocabulary as the logits are, so nothing of it is ever moved, and the host sends none of it but the
end tokens, with a prompt. Only rows that ask for it are tallied; a step without such rows passes all this by.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from podquant.model.axes import TP
from podquant.model.layout import CacheShape, Model

NUM_ENDS = 128
"""Tokens that may end an output: the model's, and those of a request."""

_IN_PROMPT = 1 << 30
_ENDS = 1 << 29
_COUNT = _ENDS - 1


class Slots(NamedTuple):
    """State by slot.

    Attributes:
        last_tokens: int32 [S + 1], on every shard; the slot behind the last is for padding.
        tallies: int32 [S, V / tp], a shard's columns; the bits above say what they hold.
    """

    last_tokens: Any
    tallies: Any


class Adjustment(NamedTuple):
    """How the logits of each row depend on its tally; arrays of length B.

    Attributes:
        is_used: bool; what the others say counts for these rows only.
        forbids_ends: bool, whether no token may be chosen that would end the output.
        repetition: float32, divides the logits above 0 of all tokens of the prompt and the output, and multiplies
            those below (Keskar et al. 2019, section 4.1).
        presence, frequency: float32, taken from the logits of tokens that were generated: once, and for each time.
    """

    is_used: jax.Array
    forbids_ends: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array


def slot_arrays(model: Model, shape: CacheShape) -> Slots:
    """Shapes, dtypes and shardings of a model's slots."""

    def struct(dims: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.int32, sharding=NamedSharding(model.mesh, PartitionSpec(*axes)))

    slots = shape.num_slots
    return Slots(struct((slots + 1,)), struct((slots, model.layout.vocab_size), None, TP))


def tally_prompt(
    tallies: jax.Array,
    slots: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    prompt_lengths: jax.Array,
    ends: jax.Array,
    is_used: jax.Array,
) -> jax.Array:
    """Tally one prefill step; the first of a sequence begins with nothing.

    Args:
        tallies: this shard's.
        slots, prompt_lengths: int32 [B].
        tokens, positions: int32 [B, T]; positions of padding are negative. What lies behind the prompt was generated,
            before the sequence lost its pages.
        ends: int32 [B, NUM_ENDS], tokens that would end the output; negative ones are padding.
        is_used: bool [B]; other rows are left alone.
    """
    width = tallies.shape[1]

    def extend(tally: jax.Array, ids: jax.Array, at: jax.Array, prompt: jax.Array, end: jax.Array) -> jax.Array:
        columns = jnp.where(at >= 0, _columns(ids, width), width)
        prompted = jnp.zeros(width, jnp.bool_).at[columns].max(at < prompt, mode="drop")
        generated = jnp.zeros(width, jnp.int32).at[columns].add((at >= prompt).astype(jnp.int32), mode="drop")
        ending = jnp.zeros(width, jnp.bool_).at[_columns(end, width)].set(True, mode="drop")
        kept = jnp.where(at[0] == 0, 0, tally) + generated
        return kept | jnp.where(prompted, _IN_PROMPT, 0) | jnp.where(ending, _ENDS, 0)

    extended = jax.vmap(extend)(tallies[slots], tokens, positions, prompt_lengths, ends)
    return tallies.at[jnp.where(is_used, slots, tallies.shape[0])].set(extended, mode="drop")


def tally_generated(tallies: jax.Array, slots: jax.Array, tokens: jax.Array, is_used: jax.Array) -> jax.Array:
    """Count one generated token of each row; all int32 [B] but `is_used`, bool: other rows are left alone."""
    width = tallies.shape[1]
    return tallies.at[slots, jnp.where(is_used, _columns(tokens, width), width)].add(1, mode="drop")


def adjust(logits: jax.Array, tally: jax.Array, how: Adjustment) -> jax.Array:
    """Logits to choose from, of a shard's [B, V / tp]; `tally` is that of the same rows and columns."""
    count = (tally & _COUNT).astype(jnp.float32)
    generated = count > 0
    factor = jnp.where(generated | (tally & _IN_PROMPT > 0), how.repetition[:, None], 1.0)
    adjusted = jnp.where(logits > 0, logits / factor, logits * factor)
    adjusted -= how.frequency[:, None] * count + how.presence[:, None] * generated.astype(jnp.float32)
    adjusted = jnp.where(how.forbids_ends[:, None] & (tally & _ENDS > 0), -jnp.inf, adjusted)
    return jnp.where(how.is_used[:, None], adjusted, logits)


def _columns(tokens: jax.Array, width: int) -> jax.Array:
    """Where tokens stand among this shard's columns; `width`, where nothing is written, for those of other shards."""
    columns = tokens - jax.lax.axis_index(TP).astype(jnp.int32) * width
    return jnp.where((columns >= 0) & (columns < width) & (tokens >= 0), columns, width)
