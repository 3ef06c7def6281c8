"""Ogg (Vorbis, Opus): its pages, which say where a stream begins, and whether it is there to its end."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from data.crc import checksum
from data.mpeg import COMPLETE, TAIL, Unsound

FFMPEGS = (b"Speex   ", b"\x7fFLAC", b"\x80theora", b"fishead\0", b"CELT    ", b"PCM     ")
"""What a stream begins with that libsndfile does not read."""
PAGE = b"OggS\0"
HEAD = 27
"""Bytes of a page before its table of lengths."""
FIRST, LAST = 2, 4
"""Bits of a page that begins, and that ends, a stream."""
CHECK = slice(22, 26)
"""Where the checksum of a page stands, which counts as zero in itself."""


class Page(NamedTuple):
    """Bytes [start, end) of a page, as its header has them, and its bits."""

    start: int
    end: int
    flags: int


def starts(content: bytes) -> list[int]:
    """Where the files begin that are end to end in content; streams that begin together are of one file.

    Raises Unsound for one that is cut off, or damaged in its middle: libsndfile reads on as if nothing were
    missing.
    """
    if not (pages := list(_pages(content))):
        return [0]
    lost = sum(after.start - page.end for page, after in pairwise(pages))
    if lost > (1 - COMPLETE) * len(content):
        raise Unsound(f"is damaged: {lost:,} of its {len(content):,} bytes are no pages of Ogg")
    _check_end(content, pages[-1])
    later = [after.start for page, after in pairwise(pages) if after.flags & FIRST and not page.flags & FIRST]
    return [0, *later]


def _pages(content: bytes) -> Iterator[Page]:
    at = 0
    while (at := content.find(PAGE, at)) >= 0:
        header = content[at : at + HEAD].ljust(HEAD, b"\xff")
        lengths = content[at + HEAD : at + HEAD + header[-1]].ljust(header[-1], b"\xff")
        page = Page(at, at + HEAD + len(lengths) + sum(lengths), header[5])
        yield page
        at = page.end


def _check_end(content: bytes, page: Page) -> None:
    """Raise Unsound if the last page is not that of an end, nor whole: a stream that was recorded up to some
    moment has whole pages."""
    there = len(content)
    if page.flags & LAST and page.end * COMPLETE <= there:
        return
    body = content[page.start : page.end]
    stated = int.from_bytes(body[CHECK], "little")
    whole = checksum(body[: CHECK.start] + bytes(4) + body[CHECK.stop :], 0x04C1_1DB7, 32) == stated
    if page.end > there or not whole or there - page.end > TAIL:
        raise Unsound("is cut off: its last page is not all there, and none says that it is the end")
