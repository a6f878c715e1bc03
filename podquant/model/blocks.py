"""Scale blocks along the input axis of a weight that is cut anywhere, and the product with such a weight.

A loop takes one block at a time: it reads the codes once, as they are stored, scales what they give and adds it up. In
one product over all blocks at once XLA would move the blocks to the front: a copy of the weight on TPU (libtpu 0.0.50,
K 8192, N 14336: 1.7 to 2.9 times the bytes), and 5 to 60 times the loop's time on CPU (K and N 2048).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp

from podquant.model.axes import TP

_MOST_SUM_BYTES = 8 << 20
"""Of a product that is added up at one time: every block reads and writes it, so it has to stay in a TPU's VMEM."""

_LANES = 128


class Matrix(NamedTuple):
    """One matrix [rows, columns] of a stack.

    A loop that is given a matrix sliced from a stack is given a copy of it; one that is given this takes what it reads
    out of the stack.

    Attributes:
        stack: [..., rows, columns].
        place: int32 scalars, where in the axes in front.
    """

    stack: jax.Array
    place: tuple[jax.Array, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, columns = self.stack.shape[-2:]
        return rows, columns

    def part(self, row: jax.Array | int, column: jax.Array | int, shape: tuple[int, int]) -> jax.Array:
        """`shape` of it from (row, column) on."""
        ones = (1,) * len(self.place)
        return jax.lax.dynamic_slice(self.stack, (*self.place, row, column), (*ones, *shape)).reshape(shape)

    def whole(self) -> jax.Array:
        """All of it."""
        return self.part(0, 0, self.shape) if self.place else self.stack


@dataclass(frozen=True)
class BlockCut:
    """Where scale blocks lie on an axis that is cut into equal shards, whose bounds need not be those of blocks.

    A shard holds the scales of every block that it touches, `count` of them.

    Attributes:
        size: columns of a block; the last one of the axis may have fewer.
        width: columns of a shard.
        shards: of the axis, side by side in the mesh.
    """

    size: int
    width: int
    shards: int

    @cached_property
    def count(self) -> int:
        """Blocks that a shard touches, at most."""
        return max(self._last(shard) - self._first(shard) for shard in range(self.shards)) + 1

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """Which block each column of scales is of, for one shard behind the other; what is left over repeats one."""
        return tuple(
            min(self._first(shard) + number, self._last(shard))
            for shard in range(self.shards)
            for number in range(self.count)
        )

    @property
    def is_one(self) -> bool:
        """Whether all of the axis is one block."""
        return self.width * self.shards <= self.size

    @property
    def straddles(self) -> bool:
        """Whether a shard of several blocks begins inside one."""
        return self.count > 1 and any(shard * self.width % self.size for shard in range(self.shards))

    def _first(self, shard: int) -> int:
        return shard * self.width // self.size

    def _last(self, shard: int) -> int:
        return ((shard + 1) * self.width - 1) // self.size


Dot = Callable[[jax.Array, jax.Array], jax.Array]
"""[M, k] by [out, k] over k: [M, out]."""


def block_product(rows: jax.Array, weight: Matrix, scale: Matrix, cut: BlockCut, dot: Dot) -> jax.Array:
    """The sum over blocks of (rows_b . W_b^T) * scale_b, each block's product exact before it is scaled.

    Args:
        rows: [M, width].
        weight: [out, width] codes of this shard.
        scale: [out, count] float32 of this shard.
        cut: where the blocks lie.
        dot: the product of a block.

    Returns:
        [M, out] float32.
    """
    out = weight.shape[0]
    height = _tile_height(rows.shape[0], out)
    if height == out:
        return _tile(rows, weight, scale, cut, dot, (0, out))

    def body(number: jax.Array, filled: jax.Array) -> jax.Array:
        first = number * height
        part = _tile(rows, weight, scale, cut, dot, (first, height))
        return jax.lax.dynamic_update_slice_in_dim(filled, part, first, axis=1)

    y = jnp.zeros((rows.shape[0], out), jnp.float32)
    result: jax.Array = jax.lax.fori_loop(0, out // height, body, y)
    return result


def _tile_height(num_rows: int, out: int) -> int:
    """Outputs that are added up at one time: all, or whole registers of them that divide all."""
    most = _MOST_SUM_BYTES // (4 * num_rows)
    if out <= most or out % _LANES:
        return out
    lanes = out // _LANES
    return _LANES * max(n for n in range(1, max(1, most // _LANES) + 1) if lanes % n == 0)


def _tile(
    rows: jax.Array, weight: Matrix, scale: Matrix, cut: BlockCut, dot: Dot, outputs: tuple[jax.Array | int, int]
) -> jax.Array:
    """[M, height] of the outputs (first, height)."""
    first, height = outputs

    def scales(number: jax.Array | int) -> jax.Array:
        return scale.part(first, number, (height, 1)).reshape(1, -1)

    def term(number: jax.Array | int, width: int) -> jax.Array:
        column = number * cut.size
        x = jax.lax.dynamic_slice_in_dim(rows, column, width, axis=1)
        codes = weight.part(first, column, (height, width))
        if not cut.straddles:
            return dot(x, codes).astype(jnp.float32) * scales(number)
        # The columns lie in two blocks: their products are kept apart by rows, and the codes are read once.
        begun = jax.lax.axis_index(TP) % cut.shards * cut.width % cut.size
        is_first = jnp.arange(width, dtype=jnp.int32)[None, :] < cut.size - begun
        zero = jnp.zeros((), x.dtype)
        both = jnp.concatenate([jnp.where(is_first, x, zero), jnp.where(is_first, zero, x)])
        lower, upper = jnp.split(dot(both, codes).astype(jnp.float32), 2)
        return lower * scales(number) + upper * scales(jnp.minimum(number + 1, cut.count - 1))

    whole, rest = divmod(cut.width, cut.size)
    y = jnp.zeros((rows.shape[0], height), jnp.float32)
    if whole:
        y = jax.lax.fori_loop(0, whole, lambda number, y: y + term(number, cut.size), y)
    return y + term(whole, rest) if rest else y
