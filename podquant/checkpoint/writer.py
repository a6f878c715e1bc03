"""A safetensors file written front to back: the header first, then each tensor in pieces of rows.

Holds no tensor and never seeks, so it needs no memory but what the caller passes in. Knows nothing of storage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from podquant.checkpoint.header import encode_header
from podquant.dtypes import DType
from podquant.errors import CheckpointError
from podquant.storage.store import Writer

_PT = {"format": "pt"}  # other readers of checkpoints expect it


class SafetensorsWriter:
    """Writes `entries` (name, dtype, shape) in order to `writer`, starting with the header.

    `CheckpointError` names the file and the tensor if what is appended is not what was declared.
    """

    def __init__(
        self,
        writer: Writer,
        entries: Sequence[tuple[str, DType, tuple[int, ...]]],
        metadata: Mapping[str, str] = _PT,
    ) -> None:
        self._writer = writer
        self._entries = list(entries)
        self._current = 0
        self._elements = 0  # written of the current tensor
        writer.write(encode_header(self._entries, metadata))
        self._skip_complete()

    def append(self, name: str, rows: np.ndarray[Any, np.dtype[Any]]) -> None:
        """Append the next rows of `name`, [any, *shape[1:]]; of a tensor without axes, the whole of it."""
        if rows.size == 0:
            return  # an empty tensor is complete from the start
        if self._current == len(self._entries):
            raise CheckpointError(f"{self._writer.name}: tensor {name!r} comes after the last one declared.")
        expected, dtype, shape = self._entries[self._current]
        if name != expected:
            raise CheckpointError(f"{self._writer.name}: got tensor {name!r}, expected {expected!r} ({self._state()}).")
        total = math.prod(shape)
        if rows.dtype != dtype.numpy or rows.shape[1:] != shape[1:] or rows.ndim != len(shape):
            raise CheckpointError(
                f"{self._writer.name}: tensor {name!r}: got {rows.dtype}{list(rows.shape)}, "
                f"expected rows of {dtype.name}{list(shape)}."
            )
        if self._elements + rows.size > total:
            raise CheckpointError(
                f"{self._writer.name}: tensor {name!r}: {rows.size:,} more elements are too many ({self._state()})."
            )
        self._writer.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        self._elements += rows.size
        self._skip_complete()

    def close(self) -> None:
        """End the file; `CheckpointError` if a tensor is missing or short. Blocks until the storage has it all."""
        if self._current < len(self._entries):
            name = self._entries[self._current][0]
            raise CheckpointError(f"{self._writer.name}: closed before tensor {name!r} was complete ({self._state()}).")
        self._writer.close()

    def _state(self) -> str:
        total = math.prod(self._entries[self._current][2])
        return f"{self._elements:,} of its {total:,} elements written"

    def _skip_complete(self) -> None:
        """Move on to the first tensor that still needs bytes; an empty one never does."""
        while self._current < len(self._entries) and self._elements == math.prod(self._entries[self._current][2]):
            self._current += 1
            self._elements = 0
