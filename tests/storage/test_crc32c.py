"""Checksums of parts make that of the whole, against the library that computes it from the bytes."""

from __future__ import annotations

import google_crc32c
from hypothesis import given
from hypothesis import strategies as st

from podquant.storage.crc32c import combine


@given(st.lists(st.binary(max_size=700), max_size=6))
def test_of_joined_parts(parts: list[bytes]) -> None:
    assert combine((len(part), google_crc32c.value(part)) for part in parts) == google_crc32c.value(b"".join(parts))


def test_of_parts_too_large_to_hold() -> None:
    """Zeros are as good as any: their checksums differ by their number."""
    block = google_crc32c.value(bytes(1 << 20))
    crc = 0
    for _ in range(300):
        crc = google_crc32c.extend(crc, bytes(1 << 20))
    assert combine([(1 << 20, block)] * 300) == crc
    assert combine([(300 << 20, crc), (0, 0)]) == crc
