"""Chunks are as large as helps while few files are written at once, and all together never large."""

from __future__ import annotations

import pytest

from podquant.storage.gcs.chunks import CHUNK_BYTES, chunk_bytes, uploads_nbytes


@pytest.mark.parametrize(("num_files", "chunk"), [(1, 8 << 20), (9, 8 << 20), (17, 11 << 19), (65, 5 << 18)])
def test_more_files_at_a_time_go_in_smaller_chunks(num_files: int, chunk: int) -> None:
    assert chunk_bytes(num_files) == chunk


def test_chunks_are_what_the_store_takes_and_stay_within_bounds() -> None:
    for num_files in range(1, 1025):
        chunk = chunk_bytes(num_files)
        assert chunk % (256 << 10) == 0
        assert 0 < chunk <= CHUNK_BYTES
        if num_files <= 384:
            assert uploads_nbytes(num_files) <= 200 << 20
