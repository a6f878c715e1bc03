"""What a plan is made of: tensors, what becomes of them, and the units that fill the output files.

Plain frozen values that can be sent to another host. Knows nothing of how a plan is decided or carried out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from podquant.artifact.manifest import Piece
from podquant.artifact.naming import HEADER_METADATA
from podquant.artifact.slices import Cut, pieces_of
from podquant.checkpoint.header import TensorInfo, encode_header
from podquant.config.scheme import Scheme
from podquant.dtypes import DType

Entry = tuple[str, DType, tuple[int, ...]]


@dataclass(frozen=True)
class Output:
    """A tensor of the artifact: its name, type and whole shape, and how it is cut (None: not)."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    cut: Cut | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorPlan:
    """One source tensor and what becomes of it: quantized by `scheme`, or copied (None).

    `outputs` are the tensors written: codes and scales, or the tensor itself.
    """

    source: TensorInfo
    scheme: Scheme | None
    outputs: tuple[Output, ...]

    @property
    def is_changed(self) -> bool:
        """Whether it is written in another type than it is read in."""
        return self.scheme is not None or any(each.dtype != self.source.dtype for each in self.outputs)

    def windows(self, window_bytes: int) -> Iterator[tuple[int, int]]:
        """Row ranges that cover the tensor in order; whole rows of blocks, at least one each."""
        if not self.source.shape:
            yield 0, 1
            return
        rows = self.source.shape[0]
        step = self._window_rows(window_bytes)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def window_nbytes(self, window_bytes: int) -> int:
        """Bytes of the largest window."""
        if not self.source.shape or self.source.nbytes == 0:
            return self.source.nbytes
        return min(self._window_rows(window_bytes), self.source.shape[0]) * (self.source.nbytes // self.source.shape[0])

    @property
    def held_nbytes(self) -> int:
        """Bytes that wait for the tensor's end: scales, and seven float64 statistics a row. There scales are joined."""
        rows = self.source.shape[0] if self.scheme else 0
        return 2 * sum(each.nbytes for each in self.outputs[1:]) + rows * (7 + 1) * 8

    @property
    def copied_share(self) -> float:
        """Bytes copied to be written, for one of source: some if rows are cut; slices of whole rows are not copied."""
        if not self.outputs or self.outputs[0].cut is None or self.outputs[0].cut.axis == 0:
            return 0
        return self.outputs[0].dtype.itemsize / self.source.dtype.itemsize

    def _window_rows(self, window_bytes: int) -> int:
        row_bytes = max(1, self.source.nbytes // max(1, self.source.shape[0]))
        block = 1
        if self.scheme is not None and self.scheme.weight_block_size is not None:
            block = self.scheme.weight_block_size[0]
        return max(block, window_bytes // row_bytes // block * block)


@dataclass(frozen=True)
class Unit:
    """Some whole tensors, in source order, and the output files that they fill: one, or one a rank and a shared one.

    Attributes:
        file: name of its file at tp_size 1, which is the unit's name and, in other folders, that of all its files.
        tensors: what becomes of which tensors.
        tp_size: slices a tensor is cut into.
    """

    file: str
    tensors: tuple[TensorPlan, ...]
    tp_size: int = 1

    @property
    def outputs(self) -> list[Output]:
        """The tensors it makes, in order."""
        return [output for tensor in self.tensors for output in tensor.outputs]

    def pieces(self, output: Output) -> tuple[Piece, ...]:
        """Where a tensor of this unit lies."""
        return pieces_of(self.file, output.shape, output.cut, self.tp_size)

    @property
    def files(self) -> dict[str, list[Entry]]:
        """Its output files and the tensors in each, in order."""
        files: dict[str, list[Entry]] = {}
        for output in self.outputs:
            for piece in self.pieces(output):
                files.setdefault(piece.file, []).append((output.name, output.dtype, piece.shape))
        return {name: files[name] for name in sorted(files)}

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each output file, header and all."""
        sizes: dict[str, int] = {}
        before: list[Entry] = []
        size = 0
        for name, entries in self.files.items():
            if entries != before:  # most ranks hold what the one before holds, and encoding takes long
                size, before = _file_nbytes(entries), entries
            sizes[name] = size
        return sizes

    @property
    def bytes_in(self) -> int:
        """Source bytes the unit reads."""
        return sum(tensor.source.nbytes for tensor in self.tensors)

    @property
    def bytes_out(self) -> int:
        """Bytes of its output files."""
        return sum(self.sizes.values())


def _file_nbytes(entries: list[Entry]) -> int:
    data = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in entries)
    return len(encode_header(entries, HEADER_METADATA)) + data
