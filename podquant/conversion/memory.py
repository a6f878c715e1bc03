"""What a worker holds, over what the interpreter and its libraries take: what `work` allocates and `plan` predicts.

Both ask here, so that the one cannot drift from the other. Knows nothing of how a unit is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from podquant.conversion.units import TensorPlan, Unit
from podquant.storage.gcs.chunks import uploads_nbytes

CLIENT_BYTES = 48 << 20
"""What connections to a bucket hold, 16 at a time, in the sockets' and the client's buffers."""


def windows_in_flight(threads: int) -> int:
    """Windows being read, quantized or written at a time: one for each thread, one ready and one being written."""
    return threads + 2


def files_at_a_time(tp_size: int) -> int:
    """Output files of a unit, all written at once: one, or one a rank and a shared one."""
    return 1 if tp_size == 1 else tp_size + 1


def source_nbytes(tensors: Iterable[TensorPlan], window_bytes: int) -> int:
    """Bytes of the buffer that holds the source of any window: more than asked for where a row is larger."""
    return max([window_bytes, *(tensor.window_nbytes(window_bytes) for tensor in tensors)])


def codes_nbytes(source_nbytes: int) -> int:
    """Bytes of the buffer that holds its codes: one for each element, which has two bytes at least."""
    return source_nbytes // 2


def worker_nbytes(units: Sequence[Unit], *, threads: int, window_bytes: int) -> int:
    """Bytes a worker that may do any of these units holds at most, if it reads from a bucket and writes to one."""
    return max((_unit_nbytes(unit, threads, window_bytes) for unit in units), default=0) + CLIENT_BYTES


def _unit_nbytes(unit: Unit, threads: int, window_bytes: int) -> int:
    """Buffers of the windows in flight, what is cut across their rows, what waits for a tensor's end, and uploads."""
    source = min(source_nbytes(unit.tensors, window_bytes), unit.bytes_in)  # what no window touches costs nothing
    codes = codes_nbytes(source) if any(tensor.is_changed for tensor in unit.tensors) else 0
    copies = int(source * max((tensor.copied_share for tensor in unit.tensors), default=0))
    held = max((tensor.held_nbytes for tensor in unit.tensors), default=0)
    depth = windows_in_flight(threads)
    # Copies of a window that is written live until the next one comes; its buffers are used again before.
    return depth * (source + codes) + (depth + 1) * copies + held + uploads_nbytes(files_at_a_time(unit.tp_size))
