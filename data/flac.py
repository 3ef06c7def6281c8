"""FLAC: how much audio there is by its last frame, where the header says less, or was written into a pipe."""

from __future__ import annotations

import re

from data.crc import checksum

SYNC = re.compile(rb"\xff[\xf8\xf9]")
"""What a frame begins with: blocks of one size, or of several."""
TAILS = 16 << 10, 128 << 10
"""Bytes at the end in which the last frame begins, as a rule and at most."""
BLOCKS = {1: 192, **{code: 144 << code for code in range(2, 6)}, **{code: 1 << code for code in range(8, 16)}}
"""Samples in a frame by the code in its header; 6 and 7 stand for a number of one and of two bytes."""
TOTAL = slice(18, 26)
"""Where rate, channels, depth and, in the last 36 bits, the number of samples stand."""


def mended(content: bytes) -> bytes:
    """The file with as many samples in its header as there are, where it states fewer, or none."""
    numbers = int.from_bytes(content[TOTAL], "big")
    stated = numbers & (1 << 36) - 1
    for tail in TAILS:
        for found in reversed(list(SYNC.finditer(content, max(0, len(content) - tail)))):
            if (end := _end(content, found.start())) is None:
                continue
            if end <= stated or checksum(content[found.start() :], 0x8005, 16):
                return content
            return (
                content[: TOTAL.start] + (numbers - stated + end).to_bytes(8, "big") + content[TOTAL.stop :]
            )
    return content


def _end(content: bytes, at: int) -> int | None:
    """Samples in the file up to the end of the frame that begins here; None if none does."""
    header = content[at : at + 16]
    if len(header) < 16:
        return None
    block, number, place = header[2] >> 4, header[4], 5
    more = 7 - (number ^ 0xFF).bit_length() if number >= 0xC0 else 0  # as in UTF-8
    number &= 0x7F >> more + (more > 0)
    for byte in header[place : place + more]:
        number = number << 6 | byte & 0x3F
    place += more
    size = BLOCKS.get(block, 0)
    if block in (6, 7):
        size, place = int.from_bytes(header[place : place + block - 5], "big") + 1, place + block - 5
    place += {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)
    if not size or checksum(header[: place + 1], 0x07, 8):
        return None
    if header[1] & 1:
        return number + size
    return number * int.from_bytes(content[8:10], "big") + size  # all but the last one are of that size
