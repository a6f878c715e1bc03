"""How much of each file is uploaded at a time, and the memory it takes: more files at once mean smaller chunks.

Affects memory and speed, never what is written. Knows nothing of how chunks are sent.
"""

from __future__ import annotations

CHUNK_BYTES = 8 << 20
"""Chunk of an upload when few files are written at once: enough for the storage's full speed."""

_MULTIPLE = 256 << 10  # the store takes chunks of multiples of it
_BUFFERS_BYTES = 192 << 20  # for all chunks of a process
_CHUNKS_A_FILE = 2  # one being filled, one in flight


def chunk_bytes(num_files: int) -> int:
    """Chunk of an upload when a process writes `num_files` at a time."""
    fitting = _BUFFERS_BYTES // (_CHUNKS_A_FILE * num_files) // _MULTIPLE * _MULTIPLE
    return max(_MULTIPLE, min(CHUNK_BYTES, fitting))


def uploads_nbytes(num_files: int) -> int:
    """Memory that `num_files` concurrent uploads hold at most; a file of one chunk is copied when it is sent."""
    return (_CHUNKS_A_FILE * num_files + 1) * chunk_bytes(num_files)
