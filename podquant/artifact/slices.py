"""Which tensors are cut for tensor parallelism, where, and in which files the slices lie: as their family declares.

Tensors that no family declares are cut by name and shape alone.

Knows nothing of rules, dtypes or bytes, so a tensor is cut alike whether it is quantized or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from podquant.artifact.manifest import Piece
from podquant.artifact.naming import folder_of, module_of
from podquant.families.declaration import DiskTensor
from podquant.families.modules import kind_of

_ROW_PARALLEL = frozenset(
    {"o_proj", "out_proj", "wo", "dense", "down_proj", "w2", "c_proj", "dense_4h_to_h", "fc2", "fc_out"}
)
"""Last parts of the names of undeclared modules that take what the one before them put out in slices, mostly."""


@dataclass(frozen=True)
class Cut:
    """Slices along one axis: rank r holds `[bounds[r], bounds[r + 1])`."""

    axis: int
    bounds: tuple[int, ...]

    def window(self, rank: int, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Start and shape of rank's slice of a tensor of this shape."""
        first, last = self.bounds[rank], self.bounds[rank + 1]
        start = tuple(first if axis == self.axis else 0 for axis in range(len(shape)))
        return start, tuple(last - first if axis == self.axis else size for axis, size in enumerate(shape))


def cut_of(tensor: str, shape: Sequence[int], tp_size: int, declared: DiskTensor | None = None) -> Cut | None:
    """How a tensor is cut; None for one that is not.

    Args:
        declared: what the model's family says of it; None: the name must do.

    Cut are the weights of linears, embedding and lm_head: matrices `[out, in]` that are not a router's. Row-parallel
    ones along `in`, all others along `out` (of embedding and lm_head: the vocabulary), into slices of
    `⌈size / tp_size⌉`; the last ones are smaller, or empty, where `tp_size` does not divide the size.
    """
    module = module_of(tensor)
    if tp_size == 1 or module is None or len(shape) != 2 or 0 in shape:
        return None
    axis = _axis_of(module) if declared is None else declared.cut
    if axis is None:
        return None
    return Cut(axis, _bounds(shape[axis], -(-shape[axis] // tp_size), tp_size))


def _axis_of(module: str) -> int | None:
    if kind_of(module) == "router":
        return None
    return 1 if module.rpartition(".")[2] in _ROW_PARALLEL else 0


def cut_of_scales(cut: Cut | None, scales: Sequence[int], block: tuple[int, int] | None) -> Cut | None:
    """How the scales of codes cut by `cut` are cut: like the codes, unless each slice needs all or would split a block.

    Args:
        scales: their shape, `[out, 1]` or one per block.
        block: rows and columns that share a scale.
    """
    if cut is None or cut.axis == 1:
        return None
    rows, size = 1 if block is None else block[0], cut.bounds[1]
    if size % rows and size < cut.bounds[-1]:
        return None
    return Cut(0, _bounds(scales[0], -(-size // rows), len(cut.bounds) - 1))


@lru_cache(maxsize=256)  # a unit has tens of thousands of equal experts
def pieces_of(file: str, shape: tuple[int, ...], cut: Cut | None, tp_size: int) -> tuple[Piece, ...]:
    """The pieces of a tensor that is in `file` at tp_size 1."""
    if cut is None:
        return (Piece(folder_of(None, tp_size) + file, None, (0,) * len(shape), shape),)
    return tuple(Piece(folder_of(rank, tp_size) + file, rank, *cut.window(rank, shape)) for rank in range(tp_size))


def _bounds(size: int, step: int, count: int) -> tuple[int, ...]:
    return tuple(min(rank * step, size) for rank in range(count + 1))
