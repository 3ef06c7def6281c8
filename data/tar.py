"""Tar archives as people have them, by their headers alone: ustar, GNU and PAX names and sizes, in bounded
memory.

Python's tarfile takes a damaged or cut-off header for the end of the archive and says nothing; here damage is
reported.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

BLOCK = 512
MAGIC = slice(257, 265)
NAME_BYTES = 100
ABOUT_THE_NEXT = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
)
"""Types of entries whose content says something of the next member, or of all."""
LONGER = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
"""Of those, GNU's for names that do not fit into a header, and what PAX calls them."""


class Kind(Enum):
    """What a member of an archive is."""

    FILE = "file"
    HARD_LINK = "hard link"
    SYMBOLIC_LINK = "symbolic link"
    FOLDER = "folder"
    DEVICE = "device or pipe"
    OTHER = "other"


KINDS = {
    tarfile.LNKTYPE: Kind.HARD_LINK,
    tarfile.SYMTYPE: Kind.SYMBOLIC_LINK,
    tarfile.DIRTYPE: Kind.FOLDER,
    tarfile.CHRTYPE: Kind.DEVICE,
    tarfile.BLKTYPE: Kind.DEVICE,
    tarfile.FIFOTYPE: Kind.DEVICE,
}
"""By the type in a header."""


class Member(NamedTuple):
    """A member of an archive: its name without `./`, and where its bytes are. link: what a link points to, as
    it is written."""

    name: str
    offset: int
    size: int
    kind: Kind = Kind.FILE
    link: str = ""


class Damage(Exception):
    """The archive is cut off or damaged; members before that are sound."""


def walk(read: Callable[[int, int], bytes], size: int) -> Iterator[Member]:
    """Yield the members of an archive of `size` bytes; `read(start, end)` gives its bytes.

    Raises Damage, after the members before it, where the archive is not what its headers promise.
    """
    at = 0
    longer: dict[str, str] = {}  # what headers before a member say of it, by PAX keyword
    while True:
        if at == size:
            raise Damage(f"the archive ends at byte {size} without an end marker")
        if at + BLOCK > size:
            raise Damage(f"a header at byte {at} is cut off")
        header = read(at, at + BLOCK)
        if header == bytes(BLOCK):
            return _check_end(read, at, size)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise Damage(f"the header at byte {at} is damaged ({error})") from None
        name = longer.get("path") or _name(header, member)
        if _is_sparse(member, longer):
            raise Damage(f"{name!r} at byte {at} is a sparse file; pack it without --sparse")
        start = at + BLOCK
        length = _size(longer, member) if _has_content(member) else 0
        if start + length > size:
            raise Damage(f"{name!r} at byte {at} claims {length} bytes, the archive has {size - start} left")
        at = start + -(-length // BLOCK) * BLOCK
        if member.type in LONGER:
            text = read(start, start + length).rstrip(b"\0").decode("utf-8", "surrogateescape")
            longer[LONGER[member.type]] = text
        elif member.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            longer |= _pax(read(start, start + length), start)
        elif member.type not in ABOUT_THE_NEXT:
            link = longer.get("linkpath", member.linkname) if member.islnk() or member.issym() else ""
            kind = Kind.FILE if member.isreg() else KINDS.get(member.type, Kind.OTHER)
            if kind is Kind.FOLDER:
                name = name.rstrip("/")
            yield Member(name.removeprefix("./"), start, length, kind, link)
            longer = {}


def _name(header: bytes, member: tarfile.TarInfo) -> str:
    """The name in a header. GNU's own have times where others have its beginning, as of `tar -g`, which
    tarfile does not know."""
    if header[MAGIC] != tarfile.GNU_MAGIC:
        return member.name
    return header[:NAME_BYTES].split(b"\0")[0].decode("utf-8", "surrogateescape")


def _has_content(member: tarfile.TarInfo) -> bool:
    """Whether bytes follow the header: not for folders, links and devices, whatever size they state."""
    unknown = member.type not in tarfile.SUPPORTED_TYPES  # by the standard these are read as files
    return member.isreg() or unknown or member.type in ABOUT_THE_NEXT


def _is_sparse(member: tarfile.TarInfo, longer: dict[str, str]) -> bool:
    """Whether holes of a file were left out."""
    is_sparse = member.type == tarfile.GNUTYPE_SPARSE
    return is_sparse or (bool(longer) and any(word.startswith("GNU.sparse") for word in longer))


def _size(longer: dict[str, str], member: tarfile.TarInfo) -> int:
    """Bytes of content. A PAX header before a member knows better: a large size does not fit into its own."""
    size = str(member.size)
    if member.type not in ABOUT_THE_NEXT:
        size = longer.get("size", size)
    if not size.isdecimal():
        raise Damage(f"{member.name!r} has a size of {size!r}")
    return int(size)


def _check_end(read: Callable[[int, int], bytes], at: int, size: int) -> None:
    """After the end marker come zeros only; anything else was lost from the middle, or put behind another
    archive."""
    while at < size:
        end = min(at + 128 * BLOCK, size)
        if read(at, end).strip(b"\0"):
            raise Damage(
                f"there is more behind the end marker, after byte {at}: a lost block, or archives put"
                " together with `cat`"
            )
        at = end


def _pax(records: bytes, at: int) -> dict[str, str]:
    """Parse a PAX header: lines of `LENGTH KEYWORD=VALUE`."""
    values = {}
    while records.strip(b"\0"):
        try:
            length = int(records[: records.index(b" ")])
            record = records[records.index(b" ") + 1 : length]
            keyword, value = record.removesuffix(b"\n").split(b"=", 1)
            if not record.endswith(b"\n"):
                raise ValueError
            values[keyword.decode()] = value.decode("utf-8", "surrogateescape")
        except ValueError:
            raise Damage(f"the PAX header at byte {at} is damaged") from None
        records = records[length:]
    return values
