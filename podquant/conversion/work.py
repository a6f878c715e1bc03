"""Does one unit of a plan: reads its tensors in row windows, quantizes them, and appends them to the unit's files.

Windows are read and quantized by threads while earlier ones are written, in order, by the caller's thread; how many
are in flight, and so the memory, does not depend on the size of any tensor. Small tensors that lie side by side are
read together. Knows nothing of other units or of the manifest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from podquant.artifact.manifest import OutputFile, Piece
from podquant.checkpoint.header import TensorInfo
from podquant.checkpoint.reader import read_bytes
from podquant.checkpoint.writer import SafetensorsWriter
from podquant.config.scheme import Scheme
from podquant.conversion.memory import codes_nbytes, source_nbytes, windows_in_flight
from podquant.conversion.receipts import Receipt, Seconds
from podquant.conversion.units import Output, TensorPlan, Unit
from podquant.errors import CheckpointError, NonFiniteWeightError
from podquant.quantize.finite import refuse_nonfinite
from podquant.quantize.qarray import QArray, scales_shape
from podquant.quantize.quality import Quality, QualityRows
from podquant.quantize.weights import quantize_window
from podquant.storage.runs import RecordingStore, Run
from podquant.storage.store import Store, Writer

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int], None]
"""Told the source bytes done since it was last called."""


Parts = list[tuple[str, npt.NDArray[Any]]]
"""Rows of a tensor as its pieces hold them: the file of each and what to append there."""


@dataclass(frozen=True)
class _Rows:
    """Rows `[start, stop)` of a tensor, and where in its file they lie."""

    tensor: TensorPlan
    pieces: tuple[Piece, ...]
    start: int
    stop: int
    offset: int
    nbytes: int

    @property
    def is_last(self) -> bool:
        """Whether the tensor ends with them."""
        return not self.tensor.source.shape or self.stop == self.tensor.source.shape[0]


Batch = list[_Rows]
"""Rows read at once: they lie side by side in one file. Most have one element."""


@dataclass(frozen=True)
class _Buffers:
    """Memory of one batch in flight, used again and again. Pages that no batch touches cost nothing."""

    source: Bytes
    codes: Bytes


@dataclass(frozen=True)
class _Window:
    """Rows ready to be written: of the tensor or of its codes; those cut along axis 0 lie in buffers."""

    rows: _Rows
    parts: Parts
    scales: npt.NDArray[np.float32] | None
    quality: QualityRows | None


@dataclass(frozen=True)
class _Done:
    """A batch ready to be written, the bytes it was made of, the memory to give back then, and how long it took."""

    windows: list[_Window]
    source: Bytes
    buffers: _Buffers
    seconds: Seconds


class Workbench:
    """The threads and buffers that units are done with; a context manager. Serves one unit at a time."""

    def __init__(self, tensors: Iterable[TensorPlan], *, threads: int, window_bytes: int) -> None:
        """For units of these tensors: `threads` read and quantize; `window_bytes` of source make a window."""
        self.window_bytes = window_bytes
        self.depth = windows_in_flight(threads)
        size = source_nbytes(tensors, window_bytes)
        self.buffers: SimpleQueue[_Buffers] = SimpleQueue()
        for _ in range(self.depth):
            self.buffers.put(_Buffers(np.empty(size, np.uint8), np.empty(codes_nbytes(size), np.uint8)))
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="quantize")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)


def convert_unit(
    store: Store,
    unit: Unit,
    create: Callable[[str], Writer],
    bench: Workbench,
    on_progress: Progress,
    *,
    allow_nonfinite: bool = False,
) -> Receipt:
    """Write the files of one unit. The bytes depend on the source and the unit only.

    Args:
        store: where the source is.
        create: starts a file of the artifact; it is abandoned if this ends in an error.
        allow_nonfinite: keep NaN and infinities in what is not quantized.

    Raises:
        NonFiniteWeightError: names the first wrong row in the order of the source, with tensor and file.
        StorageError: bytes could not be read or written.
    """
    quality: dict[str, Quality] = {}
    store = recorder = _recording(store)
    threads, writing, begun = Seconds(), 0.0, time.perf_counter()
    with ExitStack() as undo:
        files = {}
        for name in unit.files:
            files[name] = create(name)
            undo.callback(files[name].abandon)
        writers = {name: SafetensorsWriter(files[name], entries) for name, entries in unit.files.items()}
        scales: list[npt.NDArray[np.float32]] = []
        rows: list[QualityRows] = []
        for done in _in_order(store, unit, bench, allow_nonfinite):
            ready = time.perf_counter()
            threads += done.seconds
            for window in done.windows:
                tensor = window.rows.tensor
                _append(writers, tensor.outputs[0], window.parts)
                if window.scales is None or window.quality is None:
                    continue
                scales.append(window.scales)
                rows.append(window.quality)
                if window.rows.is_last:
                    output = tensor.outputs[1]
                    _append(writers, output, _parts(np.concatenate(scales), 0, unit.pieces(output)))
                    quality[tensor.source.name] = Quality.of(rows)
                    scales, rows = [], []
            writing += time.perf_counter() - ready
            bench.buffers.put(done.buffers)
            on_progress(len(done.source))
        ready = time.perf_counter()
        for writer in writers.values():
            writer.close()
    writing += time.perf_counter() - ready
    seconds = threads + Seconds(write=writing, wait=time.perf_counter() - begun - writing)
    written = {name: OutputFile(file.nbytes, file.crc32c) for name, file in files.items()}
    return Receipt(unit.file, written, quality, tuple(recorder.runs), seconds)


def check_equal(store: Store, first: TensorInfo, second: TensorInfo, window_bytes: int) -> tuple[Run, ...]:
    """Refuse a checkpoint whose tied tensors, of one shape and dtype, differ: leaving one out would lose it.

    Returns:
        What was read of the first.

    Raises:
        CheckpointError: names both and the first row that differs.
    """
    recorder = _recording(store)
    row_bytes = first.nbytes // first.shape[0]
    for start, stop in TensorPlan(first, None, ()).windows(window_bytes):
        left, right = (np.empty((stop - start) * row_bytes, np.uint8) for _ in range(2))
        read_bytes(recorder, first, first.offset + start * row_bytes, left)
        read_bytes(store, second, second.offset + start * row_bytes, right)
        if not np.array_equal(left, right):
            differ = (left != right).reshape(stop - start, -1).any(axis=1)
            raise CheckpointError(
                f"{store.uri}: config.json ties {first.name} to {second.name}, but both are stored and "
                f"differ from row {start + int(np.argmax(differ))} on. Set tie_word_embeddings to false if both count"
            )
    return tuple(recorder.runs)


def _recording(store: Store) -> RecordingStore:
    """Keeps checksums of what is read, where the store has some to compare with."""
    return RecordingStore(store, lambda file: store.known_crc32c(file) is not None)


def _in_order(store: Store, unit: Unit, bench: Workbench, allow_nonfinite: bool) -> Iterator[_Done]:
    """The unit's batches, done by the threads up to `bench.depth` ahead."""
    ahead: deque[Future[_Done]] = deque()
    tensors = [(tensor, unit.pieces(tensor.outputs[0])) for tensor in unit.tensors]
    for batch in _batches(tensors, bench.window_bytes):
        if len(ahead) == bench.depth:
            yield ahead.popleft().result()
        ahead.append(bench.threads.submit(_do_batch, store, batch, bench.buffers, allow_nonfinite))
    while ahead:
        yield ahead.popleft().result()


def _batches(tensors: Iterable[tuple[TensorPlan, tuple[Piece, ...]]], window_bytes: int) -> Iterator[Batch]:
    """Windows of all tensors in order, those of small ones together as far as they are neighbours."""
    batch: Batch = []
    for tensor, pieces in tensors:
        info = tensor.source
        row_bytes = info.nbytes // info.shape[0] if info.shape and info.shape[0] else info.nbytes
        for start, stop in tensor.windows(window_bytes):
            rows = _Rows(tensor, pieces, start, stop, info.offset + start * row_bytes, (stop - start) * row_bytes)
            if batch and not _joins(batch, rows, window_bytes):
                yield batch
                batch = []
            batch.append(rows)
    if batch:
        yield batch


def _joins(batch: Batch, rows: _Rows, window_bytes: int) -> bool:
    """Whether rows can be read with a batch: the next bytes of its file, few enough, and aligned in its memory."""
    first, last = batch[0], batch[-1]
    return (
        last.tensor.source.file == rows.tensor.source.file
        and last.offset + last.nbytes == rows.offset
        and rows.offset + rows.nbytes - first.offset <= window_bytes
        and (rows.offset - first.offset) % rows.tensor.source.dtype.itemsize == 0
    )


def _do_batch(store: Store, batch: Batch, free: SimpleQueue[_Buffers], allow_nonfinite: bool) -> _Done:
    """Read rows, quantize them where there is a scheme, and cut them. In a thread; the GIL is released in all three."""
    buffers = free.get()
    begun = time.perf_counter()
    begin = batch[0].offset
    source = buffers.source[: batch[-1].offset + batch[-1].nbytes - begin]
    read_bytes(store, batch[0].tensor.source, begin, source)
    read = time.perf_counter()
    windows = []
    for rows in batch:
        first = rows.offset - begin
        data, codes = source[first : first + rows.nbytes], buffers.codes[first // 2 :]
        if rows.tensor.scheme is None:
            windows.append(_keep_window(store, rows, data, codes, allow_nonfinite))
        else:
            windows.append(_quantize_window(store, rows, rows.tensor.scheme, data, codes))
    return _Done(windows, source, buffers, Seconds(read - begun, time.perf_counter() - read))


def _keep_window(store: Store, rows: _Rows, data: Bytes, free: Bytes, allow_nonfinite: bool) -> _Window:
    """Rows of a tensor that is not quantized, in the type it is written in (float64 is rounded to float32)."""
    info, written = rows.tensor.source, rows.tensor.outputs[0].dtype
    values = data.view(info.dtype.numpy)
    if not allow_nonfinite:
        _naming(store, rows, lambda: refuse_nonfinite(values.reshape(max(1, rows.stop - rows.start), -1), rows.start))
    if written != info.dtype:
        rounded = free[: values.size * written.itemsize].view(written.numpy)
        rounded[...] = values
        values = rounded
    if not info.shape:
        return _Window(rows, [(rows.pieces[0].file, values.reshape(()))], None, None)
    values = values.reshape(rows.stop - rows.start, *info.shape[1:])
    return _Window(rows, _parts(values, rows.start, rows.pieces), None, None)


def _quantize_window(store: Store, rows: _Rows, scheme: Scheme, data: Bytes, free: Bytes) -> _Window:
    info = rows.tensor.source
    source = data.view(info.dtype.numpy).reshape(rows.stop - rows.start, *info.shape[1:])
    shape = (source.shape[0], source.shape[1])
    codes = free[: source.size].view(rows.tensor.outputs[0].dtype.numpy).reshape(shape)
    block = scheme.weight_block_size
    out = QArray(codes, np.empty(scales_shape(shape, block), np.float32), block)
    _, quality = _naming(
        store,
        rows,
        lambda: quantize_window(source, scheme, first_row=rows.start, total_rows=info.shape[0], out=out),
    )
    return _Window(rows, _parts(codes, rows.start, rows.pieces), out.scales, quality)


def _naming[T](store: Store, rows: _Rows, work: Callable[[], T]) -> T:
    """What work gives; its error of a weight that is not finite with file and tensor."""
    try:
        return work()
    except NonFiniteWeightError as error:
        info = rows.tensor.source
        raise NonFiniteWeightError(f"{store.uri}/{info.file}: {info.name}: {error}") from error


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
