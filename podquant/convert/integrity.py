"""Whether the bytes that all units together have read are those that the storage of the source keeps a checksum of.

A range of an object travels without a checksum, and each unit reads only ranges; but the checksums of all ranges make
that of the whole. Knows nothing of how they were read.
"""

from __future__ import annotations

from collections.abc import Iterable

from podquant.checkpoint.index import Checkpoint
from podquant.convert.receipts import SourceRun
from podquant.storage.crc32c import combine


def corrupted_files(checkpoint: Checkpoint, runs: Iterable[SourceRun]) -> list[str]:
    """The source files whose bytes, as read, do not add up to their CRC32C; of those whose storage knows it."""
    by_file: dict[str, list[SourceRun]] = {}
    for run in runs:
        by_file.setdefault(run.file, []).append(run)
    wrong = []
    for name, info in checkpoint.files.items():
        known = checkpoint.store.known_crc32c(name)
        if known is None:
            continue
        parts = [(info.header_nbytes, info.header_crc32c)]
        end = info.header_nbytes
        for run in sorted(by_file.get(name, []), key=lambda run: run.offset):
            if run.offset == end:
                parts.append((run.nbytes, run.crc32c))
                end += run.nbytes
        if end != info.size or combine(parts) != known:
            wrong.append(name)
    return wrong
