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


def tally(
    tallies: jax.Array,
    slots: jax.Array,
    starts: jax.Array,
    prompt_lengths: jax.Array,
    is_used: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    rows: jax.Array,
    ends: jax.Array,
) -> jax.Array:
    """Tally the tokens of a step; the first step of a sequence begins with nothing.

    Args:
        tallies: this shard's.
        slots, starts, prompt_lengths: int32 [R].
        is_used: bool [R]; other rows are left alone.
        tokens, positions, rows: int32 [T], rows of those above; positions of padding are negative. What lies behind the
            prompt was generated.
        ends: int32 [NUM_ENDS, 2], rows and tokens that would end their output; negative tokens are padding.
    """
    num_slots, width = tallies.shape
    of_row = jnp.where(is_used, slots, num_slots)  # behind the last, where nothing is written
    tallies = tallies.at[jnp.where(starts == 0, of_row, num_slots)].set(0, mode="drop")
    columns = jnp.where(positions >= 0, _columns(tokens, width), width)
    in_prompt = positions < prompt_lengths[rows]

    def mark(tallies: jax.Array, slots: jax.Array, columns: jax.Array, bit: int) -> jax.Array:
        marked = tallies.at[slots, columns].get(mode="fill", fill_value=0) | bit
        return tallies.at[slots, columns].set(marked, mode="drop")  # whoever stands there twice writes the same

    tallies = mark(tallies, of_row[rows], jnp.where(in_prompt, columns, width), _IN_PROMPT)
    tallies = mark(tallies, of_row[ends[:, 0]], _columns(ends[:, 1], width), _ENDS)
    return tallies.at[of_row[rows], jnp.where(in_prompt, width, columns)].add(1, mode="drop")


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
