"""Checksums as containers of audio have them, of small parts: cyclic, the highest bit first."""

from __future__ import annotations

from functools import cache


def checksum(content: bytes, polynomial: int, bits: int) -> int:
    """CRC of content, 0 if it ends with its own."""
    table = _table(polynomial, bits)
    check = 0
    for byte in content:
        check = (check << 8 & (1 << bits) - 1) ^ table[check >> bits - 8 ^ byte]
    return check


@cache
def _table(polynomial: int, bits: int) -> list[int]:
    """What each byte does to a CRC."""
    table = []
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 else 0)
            value &= (1 << bits) - 1
        table.append(value)
    return table
