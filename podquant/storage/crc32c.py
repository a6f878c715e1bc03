"""CRC32C of a whole from the CRC32Cs of its parts, so that parts can be read by different hosts, in any order."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed (RFC 3720, appendix B.4)


def combine(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC32C of parts joined in order.

    A checksum is a polynomial over GF(2) modulo the generator; appending n bytes multiplies it by x^8n, which is a
    linear map of its 32 bits: a product of maps for the powers of two in n.

    Args:
        parts: bytes in the part, and its CRC32C.
    """
    total = 0
    for nbytes, crc in parts:
        total = _shifted(total, nbytes) ^ crc
    return total


def _shifted(crc: int, nbytes: int) -> int:
    power = 0
    while nbytes >> power:
        if nbytes >> power & 1:
            crc = _apply(_shift_map(power), crc)
        power += 1
    return crc


@cache
def _shift_map(power: int) -> tuple[int, ...]:
    """The map for 2**power bytes: where it sends each of the 32 bits."""
    if power == 0:
        step = tuple(_POLYNOMIAL if bit == 0 else 1 << (bit - 1) for bit in range(32))
        for _ in range(3):
            step = tuple(_apply(step, column) for column in step)
        return step
    half = _shift_map(power - 1)
    return tuple(_apply(half, column) for column in half)


def _apply(columns: tuple[int, ...], value: int) -> int:
    result = 0
    for bit in range(32):
        if value >> bit & 1:
            result ^= columns[bit]
    return result
