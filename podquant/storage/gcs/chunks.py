"""How much of each file is sent to a bucket at a time, and what that takes: more files at once, smaller chunks.

Decides memory and speed, never what is written. Knows nothing of how chunks are sent.
"""

from __future__ import annotations

CHUNK_BYTES = 8 << 20
"""Of an upload where few are written at once: enough for the storage's own speed."""

_MULTIPLE = 256 << 10  # the store takes chunks of multiples of it
_BUFFERS_BYTES = 192 << 20  # for all chunks of a process
_CHUNKS_A_FILE = 2  # one being filled, one under way


def chunk_bytes(num_files: int) -> int:
    """Of an upload, where a process writes `num_files` at a time."""
    fitting = _BUFFERS_BYTES // (_CHUNKS_A_FILE * num_files) // _MULTIPLE * _MULTIPLE
    return max(_MULTIPLE, min(CHUNK_BYTES, fitting))


def uploads_nbytes(num_files: int) -> int:
    """Bytes that `num_files` uploads at a time hold at most; a file of one chunk is copied when it is sent."""
    return (_CHUNKS_A_FILE * num_files + 1) * chunk_bytes(num_files)
