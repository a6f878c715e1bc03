"""Whether the bytes that all units together have read are those that the storage of the source keeps a checksum of.

A range of an object travels without a checksum, and each unit reads only ranges; but the checksums of all ranges make
that of the whole. Knows nothing of how they were read.
"""

from __future__ import annotations

from collections.abc import Iterable

from podquant.checkpoint.index import Checkpoint
from podquant.storage.runs import Run, adds_up


def corrupted_files(checkpoint: Checkpoint, runs: Iterable[Run]) -> list[str]:
    """The source files whose bytes, as read, do not add up to their CRC32C; of those whose storage knows it."""
    by_file: dict[str, list[Run]] = {}
    for run in runs:
        by_file.setdefault(run.file, []).append(run)
    return [name for name, whole in checkpoint.wholes.items() if not adds_up(name, whole, by_file.get(name, []))]
