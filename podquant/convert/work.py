"""Does one unit of a plan: reads its tensors in row windows, quantizes them, and appends them to the unit's files.

Windows are read and quantized by threads while earlier ones are written, in order, by the caller's thread; how many
are in flight, and so the memory, does not depend on the size of any tensor. Knows nothing of other units or of the
manifest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from podquant.artifact.manifest import OutputFile, Piece
from podquant.checkpoint.header import TensorInfo
from podquant.checkpoint.index import Checkpoint
from podquant.checkpoint.reader import read_rows, read_tensor
from podquant.checkpoint.writer import SafetensorsWriter
from podquant.convert.plan import WINDOW_BYTES, windows_in_flight
from podquant.convert.units import Output, TensorPlan, Unit
from podquant.errors import CheckpointError, NonFiniteWeightError
from podquant.quantize.qarray import QArray, scales_shape
from podquant.quantize.quality import Quality, QualityRows
from podquant.quantize.weights import quantize_window
from podquant.storage.store import Writer

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int], None]
"""Told the source bytes done since it was last called."""


Parts = list[tuple[str, npt.NDArray[Any]]]
"""Rows of a tensor as its pieces hold them: the file of each and what to append there."""


@dataclass(frozen=True)
class Receipt:
    """A unit done: its files as written, and what quantization did to each of its weights."""

    unit: str
    files: dict[str, OutputFile]
    quality: dict[str, Quality]


@dataclass(frozen=True)
class _Buffers:
    """Memory of one window in flight, used again and again. Pages that no window touches cost nothing."""

    source: Bytes
    codes: Bytes


@dataclass(frozen=True)
class _Window:
    """A window ready to be written: rows of the tensor or of its codes; those cut along axis 0 lie in `buffers`."""

    parts: Parts
    scales: npt.NDArray[np.float32] | None
    quality: QualityRows | None
    nbytes: int
    buffers: _Buffers


class Workbench:
    """The threads and buffers that units are done with; a context manager. Serves one unit at a time."""

    def __init__(self, tensors: Iterable[TensorPlan], *, workers: int, window_bytes: int = WINDOW_BYTES) -> None:
        """For units of these tensors: `workers` threads read and quantize; `window_bytes` of source make a window."""
        self.window_bytes = window_bytes
        self.depth = windows_in_flight(workers)
        size = max((tensor.window_nbytes(window_bytes) for tensor in tensors), default=0)
        self.buffers: SimpleQueue[_Buffers] = SimpleQueue()
        for _ in range(self.depth):
            self.buffers.put(_Buffers(np.empty(size, np.uint8), np.empty(size // 2, np.uint8)))
        self.threads = ThreadPoolExecutor(workers, thread_name_prefix="quantize")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)


def convert_unit(
    checkpoint: Checkpoint, unit: Unit, create: Callable[[str], Writer], bench: Workbench, on_progress: Progress
) -> Receipt:
    """Write the files of one unit. The bytes depend on the checkpoint and the unit only.

    Args:
        create: starts a file of the artifact.

    Raises:
        NonFiniteWeightError: names the first wrong row in the order of the source, with tensor and file.
        StorageError: bytes could not be read or written.
    """
    files = {name: create(name) for name in unit.files}
    writers = {name: SafetensorsWriter(files[name], entries) for name, entries in unit.files.items()}
    quality: dict[str, Quality] = {}
    for tensor, windows in _in_order(checkpoint, unit, bench):
        scales: list[npt.NDArray[np.float32]] = []
        rows: list[QualityRows] = []
        for window in windows:
            _append(writers, tensor.outputs[0], window.parts)
            if window.scales is not None and window.quality is not None:
                scales.append(window.scales)
                rows.append(window.quality)
            bench.buffers.put(window.buffers)
            on_progress(window.nbytes)
        if tensor.scheme is not None:
            output = tensor.outputs[1]
            _append(writers, output, _parts(np.concatenate(scales), 0, unit.pieces(output)))
            quality[tensor.source.name] = Quality.of(rows)
    for writer in writers.values():
        writer.close()
    return Receipt(unit.file, {name: OutputFile(file.nbytes, file.crc32c) for name, file in files.items()}, quality)


def check_equal(checkpoint: Checkpoint, first: TensorInfo, second: TensorInfo, bench: Workbench) -> None:
    """Refuse a checkpoint whose tied tensors, of one shape and dtype, differ: leaving one out would lose it.

    Raises:
        CheckpointError: names both and the first row that differs.
    """
    left, right = bench.buffers.get(), bench.buffers.get()
    for start, stop in TensorPlan(first, None, ()).windows(bench.window_bytes):
        a, b = _read(checkpoint, first, start, stop, left.source), _read(checkpoint, second, start, stop, right.source)
        if not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            differ = (a.view(np.uint8) != b.view(np.uint8)).reshape(stop - start, -1).any(axis=1)
            raise CheckpointError(
                f"{checkpoint.store.uri}: config.json ties {first.name} to {second.name}, but both are stored and "
                f"differ from row {start + int(np.argmax(differ))} on. Set tie_word_embeddings to false if both count"
            )
    bench.buffers.put(left)
    bench.buffers.put(right)


def _in_order(checkpoint: Checkpoint, unit: Unit, bench: Workbench) -> Iterator[tuple[TensorPlan, Iterator[_Window]]]:
    """Each tensor with its windows, done by the threads up to `bench.depth` ahead, across tensors."""
    ahead: deque[Future[_Window]] = deque()
    jobs = (
        (tensor, pieces, *rows)
        for tensor in unit.tensors
        for pieces in (unit.pieces(tensor.outputs[0]),)
        for rows in tensor.windows(bench.window_bytes)
    )

    def advance() -> None:
        while len(ahead) < bench.depth and (job := next(jobs, None)) is not None:
            ahead.append(bench.threads.submit(_do_window, checkpoint, *job, bench.buffers))

    def windows(count: int) -> Iterator[_Window]:
        for _ in range(count):
            advance()
            yield ahead.popleft().result()

    for tensor in unit.tensors:
        yield tensor, windows(sum(1 for _ in tensor.windows(bench.window_bytes)))


def _do_window(
    checkpoint: Checkpoint,
    tensor: TensorPlan,
    pieces: tuple[Piece, ...],
    start: int,
    stop: int,
    free: SimpleQueue[_Buffers],
) -> _Window:
    """Read rows, quantize them under a scheme, and cut them. Runs in a thread; the GIL is released in all three."""
    buffers = free.get()
    source = _read(checkpoint, tensor.source, start, stop, buffers.source)
    if tensor.scheme is None:
        return _Window(_parts(source, start, pieces), None, None, source.nbytes, buffers)
    shape = (source.shape[0], source.shape[1])
    codes = buffers.codes[: source.size].view(tensor.outputs[0].dtype.numpy).reshape(shape)
    block = tensor.scheme.weight_block_size
    out = QArray(codes, np.empty(scales_shape(shape, block), np.float32), block)
    try:
        _, quality = quantize_window(source, tensor.scheme, first_row=start, total_rows=tensor.source.shape[0], out=out)
    except NonFiniteWeightError as error:
        place = f"{checkpoint.store.uri}/{tensor.source.file}: {tensor.source.name}"
        raise NonFiniteWeightError(f"{place}: {error}") from error
    return _Window(_parts(codes, start, pieces), out.scales, quality, source.nbytes, buffers)


def _parts(rows: npt.NDArray[Any], start: int, pieces: tuple[Piece, ...]) -> Parts:
    """Rows from `start` on of a tensor, cut as its pieces are; contiguous, and copied only where they were not."""
    if len(pieces) == 1:
        return [(pieces[0].file, rows)]
    parts: Parts = []
    for piece in pieces:
        box = tuple(
            slice(max(0, first - origin), max(0, first - origin + size))
            for first, size, origin in zip(piece.start, piece.shape, (start, *(0,) * (rows.ndim - 1)), strict=True)
        )
        if (part := rows[box]).size:
            parts.append((piece.file, np.ascontiguousarray(part)))
    return parts


def _append(writers: Mapping[str, SafetensorsWriter], output: Output, parts: Parts) -> None:
    for file, rows in parts:
        writers[file].append(output.name, rows)


def _read(checkpoint: Checkpoint, info: TensorInfo, start: int, stop: int, buffer: Bytes) -> npt.NDArray[Any]:
    if not info.shape:
        return read_tensor(checkpoint, info.name)
    row_bytes = info.nbytes // max(1, info.shape[0])
    rows = buffer[: (stop - start) * row_bytes].view(info.dtype.numpy).reshape(stop - start, *info.shape[1:])
    return read_rows(checkpoint, info, start, stop, out=rows)
