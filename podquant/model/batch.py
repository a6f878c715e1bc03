"""Where the tokens of a step stand: one flat batch, packed by sequence, the same for every layer.

A step takes T tokens of R rows. A row is a run of tokens of one sequence: one that is generating has one token, a
prompt as many as the step has room for. Rows lie one behind the other, those of a single token first; what is left of
the T tokens is padding. Knows nothing of weights, or of what attention does with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from podquant.families.config import ModelConfig
from podquant.model.rope import logn_scale, rotation


@dataclass(frozen=True)
class Batch:
    """A flat batch.

    Attributes:
        positions: int32 [T], of each token in its sequence; 0 for padding.
        rows: int32 [T], the row of each token.
        is_token: bool [T], false for padding.
        write_pages, write_slots: int32 [T], where each token's key and value go; page 0 takes those of padding.
        firsts, starts, lengths: int32 [R], of each row: its first token's index in the batch and position in its
            sequence, and its tokens; no tokens in rows that are padding.
        page_table: int32 [R, W], the pages of each row's sequence in order.
        pages_per_layer: pages each layer has.
        cos_sin: float32 [T, 1, H/2] each, the rotation at `positions`.
        other_cos_sin: those of layers that rotate otherwise.
        query_scale: float32 [T, 1, 1], on queries once they are rotated; None for none.
    """

    positions: jax.Array
    rows: jax.Array
    is_token: jax.Array
    write_pages: jax.Array
    write_slots: jax.Array
    firsts: jax.Array
    starts: jax.Array
    lengths: jax.Array
    page_table: jax.Array
    pages_per_layer: int
    cos_sin: tuple[jax.Array, jax.Array]
    other_cos_sin: tuple[tuple[jax.Array, jax.Array], ...] = ()
    query_scale: jax.Array | None = None

    @property
    def lasts(self) -> jax.Array:
        """int32 [R], each row's last token's index in the batch; 0 for rows without tokens."""
        return jnp.where(self.lengths > 0, self.firsts + self.lengths - 1, 0)

    def of_layer(self, rope: jax.Array | None) -> Batch:
        """The same with the rotation of a layer: int32 scalar 0 for `cos_sin`, i for `other_cos_sin[i - 1]`."""
        if rope is None:
            return self
        pairs = zip(self.cos_sin, *self.other_cos_sin, strict=True)
        cos, sin = (jax.lax.dynamic_index_in_dim(jnp.stack(kinds), rope, keepdims=False) for kinds in pairs)
        return replace(self, cos_sin=(cos, sin))


def flat_batch(
    config: ModelConfig,
    num_tokens: int,
    starts: jax.Array,
    lengths: jax.Array,
    prompt_lengths: jax.Array,
    page_table: jax.Array,
    *,
    page_size: int,
    pages_per_layer: int,
) -> Batch:
    """Lay out the rows of a step.

    Args:
        config: the model, for its rotations.
        num_tokens: T, at least the sum of `lengths`.
        starts, lengths: int32 [R], the position of each row's first token, and its tokens; those of one token first.
        prompt_lengths: int32 [R], of the whole prompts, which rotations that depend on it need.
        page_table: int32 [R, W].
        page_size: tokens of a page.
        pages_per_layer: pages each layer has.
    """
    ends = jnp.cumsum(lengths)
    firsts = ends - lengths
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    rows = jnp.minimum((ends[None, :] <= index[:, None]).sum(axis=1, dtype=jnp.int32), len(lengths) - 1)
    is_token = index < ends[-1]
    positions = jnp.where(is_token, starts[rows] + index - firsts[rows], 0)
    turn = (config.head_dim, positions, prompt_lengths[rows])
    return Batch(
        positions=positions,
        rows=rows,
        is_token=is_token,
        write_pages=jnp.where(is_token, page_table[rows, positions // page_size], 0),
        write_slots=jnp.where(is_token, positions % page_size, 0),
        firsts=firsts,
        starts=starts,
        lengths=lengths,
        page_table=page_table,
        pages_per_layer=pages_per_layer,
        cos_sin=rotation(config.rope, *turn),
        other_cos_sin=tuple(rotation(rope, *turn) for rope in config.other_ropes),
        query_scale=None if config.logn_length is None else logn_scale(config.logn_length, positions),
    )
