"""Tar archives as people have them, by their headers alone: ustar, GNU and PAX names and sizes, in bounded memory.

Python's tarfile takes a damaged or cut-off header for the end of the archive and says nothing; here damage is reported.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = 512


@dataclass(frozen=True)
class Member:
    """A file in an archive: its name without `./`, and where its bytes are."""

    name: str
    offset: int
    size: int


class Damage(Exception):
    """The archive is cut off or damaged; members before that are sound."""


def walk(read: Callable[[int, int], bytes], size: int) -> Iterator[Member]:
    """Yield the regular files of an archive of `size` bytes; `read(start, end)` gives its bytes.

    Raises Damage, after the members before it, where the archive is not what its headers promise.
    """
    at = 0
    longer: dict[str, str] = {}
    while True:
        if at + BLOCK > size:
            raise Damage(f"the archive ends at byte {size} without an end marker" if at == size else f"a header at byte {at} is cut off")
        header = read(at, at + BLOCK)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if header == bytes(BLOCK):
                return
            raise Damage(f"the header at byte {at} is damaged ({error})") from None
        start = at + BLOCK
        length = int(longer.get("size", member.size))
        if start + length > size:
            raise Damage(f"{longer.get('path', member.name)!r} at byte {at} claims {length} bytes, the archive has {size - start} left")
        at = start + -(-length // BLOCK) * BLOCK
        if member.type == tarfile.GNUTYPE_LONGNAME:
            longer["path"] = read(start, start + length).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif member.type == tarfile.XHDTYPE:
            longer |= _pax(read(start, start + length), start)
        elif member.type in (tarfile.GNUTYPE_SPARSE,) or "GNU.sparse.map" in longer:
            raise Damage(f"{member.name!r} at byte {start - BLOCK} is a sparse file; pack it without --sparse")
        elif member.type not in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            if member.isreg():
                yield Member(longer.get("path", member.name).removeprefix("./"), start, length)
            longer = {}


def _pax(records: bytes, at: int) -> dict[str, str]:
    """Parse a PAX header: lines of `LENGTH KEYWORD=VALUE`."""
    found = {}
    while records.strip(b"\0"):
        try:
            length = int(records[: records.index(b" ")])
            keyword, value = records[records.index(b" ") + 1 : length - 1].split(b"=", 1)
        except ValueError:
            raise Damage(f"the PAX header at byte {at} is damaged") from None
        found[keyword.decode()] = value.decode("utf-8", "surrogateescape")
        records = records[length:]
    return found
