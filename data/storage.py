"""Shards, through fsspec: local files, s3, https, hf, whatever it opens."""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import get_loop
from fsspec.utils import glob_translate

from configs.errors import DataError
from data import retry
from data.location import Location
from data.ranges import Range, SinkFailed, Whole, within
from data.retry import STATS, Trouble, advice

TAGS = (
    "ETag",
    "etag",
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "xet_hash",
    "blob_id",
    "md5Hash",
)
"""What file systems call that which changes with the content."""
REQUESTS = 32
"""Requests at a time, where many objects are asked for."""
WORTH_A_LIST = 32
"""Objects in a folder from which on its list is asked for: they are not alone in it, perhaps."""


@dataclass(frozen=True)
class Stat:
    """Size in bytes, and a tag that changes when the content is replaced (ETag, or modification time)."""

    size: int
    tag: str


def stat(location: Location) -> Stat:
    """Size and tag of a shard. Raises DataError if it is not there or may not be read."""
    known = find(location)
    if known is None:
        raise DataError(f"{location.url}: cannot read its size: it does not exist. {advice(location)}")
    return known


def taste(location: Location) -> Stat:
    """As `stat`, once a byte has come, too: an archive, or a server without ranges, tells a size all the
    same. Raises as `read` does."""
    known = stat(location)
    read(location, 0, min(1, known.size))
    return known


def find(location: Location) -> Stat | None:
    """Size and tag of an object, None if it is not there. Raises DataError if it may not be read."""

    def info(filesystem: Any, path: str) -> Stat | None:
        filesystem.invalidate_cache(filesystem._parent(path))
        try:
            if filesystem.async_impl:
                asking = _info(filesystem, path, location)
                entry = asyncio.run_coroutine_threadsafe(asking, get_loop()).result()
            else:
                entry = filesystem.info(path)
        except FileNotFoundError as error:  # fsspec's http says so of any failure
            from botocore.exceptions import ClientError

            cause = error.__cause__
            said_so = isinstance(cause, (FileNotFoundError, ClientError))
            if cause is None or said_so or getattr(cause, "status", 0) in (404, 410):
                return None
            raise cause from cause.__cause__
        if entry["size"] is None and entry.get("type") == "file":
            raise DataError(f"{location.url}: {_without_size(entry)}")
        return _stat(entry)

    return Trouble(location, "read its size").retry(info)


async def _info(filesystem: Any, path: str, location: Location) -> dict[str, Any]:
    """What a file system says of an object. Where an answer is refused without a word why, as to a HEAD, a
    byte is asked for: that refusal has a body."""
    limit = retry.LIMITS.answer
    late = f"no answer within {limit:.0f} s"
    try:
        entry: dict[str, Any] = await within(limit, late, filesystem._info(path))
        return entry
    except OSError as error:
        from data.answers import answer_of

        answer = answer_of(error)
        refused = 300 <= answer.status < 500 or answer.status == 501
        if location.is_s3 and refused and answer.status != 404 and not answer.code:
            await within(limit, late, filesystem._cat_file(path, start=0, end=1))
        raise


def _without_size(entry: dict[str, Any]) -> str:
    """Why an object without a size is of no use, as a web server answers that makes it while it is sent."""
    if entry.get("mimetype") == "text/html":
        return "is a web page: did its download need a sign-in? Check the URL"
    return (
        "this server does not say how large it is (no Content-Length), so that it can neither be indexed nor"
        " verified: copy it to a disk with curl or wget"
    )


def find_all(locations: Sequence[Location]) -> list[Stat | None]:
    """As `find` of each; of many in one folder of an S3 bucket by its list, which takes a request for every
    thousand, or was made by `glob` just now."""
    folders = Counter((location.url.rpartition("/")[0], location.options) for location in locations)
    with ThreadPoolExecutor(REQUESTS) as pool:
        large = [folder for folder, count in folders.items() if count >= WORTH_A_LIST]
        lists = pool.map(_list, [Location(url, options) for url, options in large])
        listed = dict(zip(large, lists, strict=True))

        def look(location: Location) -> Stat | None:
            folder, _, name = location.url.rpartition("/")
            content = listed.get((folder, location.options))
            return find(location) if content is None else content.get(name)

        return list(pool.map(look, locations))


def _list(folder: Location) -> dict[str, Stat] | None:
    """What is in a folder of an S3 bucket, by name; None if it is none, or may not be listed."""

    def entries(filesystem: Any, path: str) -> dict[str, Stat] | None:
        if not folder.is_s3:
            return None
        try:
            return {
                entry["name"].rpartition("/")[2]: _stat(entry)
                for entry in filesystem.ls(path, detail=True)
                if entry["type"] == "file"
            }
        except (FileNotFoundError, PermissionError):
            return None

    return Trouble(folder, "read its list").retry(entries)


def _stat(entry: dict[str, Any]) -> Stat:
    """What a file system says of a file, in our words."""
    tag = next((str(entry[name]) for name in TAGS if entry.get(name)), "")
    return Stat(int(entry["size"] or 0), tag)


def glob(location: Location, folder: str = "") -> list[Location]:
    """The objects that a URL with `*`, `?` or `[...]` matches. folder: its beginning that is there as it is
    written and no pattern, whatever is in its names."""

    def match(filesystem: Any, path: str) -> list[Location]:
        literal = filesystem._strip_protocol(folder) if folder else ""
        paths = _glob(filesystem, path, literal, local=location.is_local)
        urls = paths if location.is_local else [filesystem.unstrip_protocol(path) for path in paths]
        return [Location(url, location.options) for url in urls]

    return Trouble(location, "read the list of shards").retry(match)


def _glob(filesystem: AbstractFileSystem, path: str, literal: str, *, local: bool) -> list[str]:
    """As the file system's own; which leaves out folders that cannot be listed where a folder's name is a
    pattern (here that is an error), and takes every bracket for one."""
    plain = re.split(r"[*?[]", path[len(literal) :], maxsplit=1)[0]
    root, _, _ = f"{literal}{plain}".rpartition("/")
    pattern = path[len(root) + 1 :]
    is_flat = "/" not in pattern
    if "http" in filesystem.protocol or (is_flat and not re.search(r"[*?[]", root)):
        return list(filesystem.glob(path))
    if local:
        files = _files(root or "/", flat=is_flat)
    else:
        files = filesystem.find(root, maxdepth=1 if is_flat else None)
    wanted = re.compile(re.escape(f"{root}/") + glob_translate(pattern))
    return sorted(filter(wanted.match, files))


def _files(root: str, *, flat: bool) -> Iterator[str]:
    """The files in a folder of this machine, and, if not flat, in all below it."""

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        if flat:
            folders.clear()
        yield from (f"{folder.rstrip('/')}/{name}" for name in names)


def read(location: Location, start: int, end: int) -> bytes:
    """Bytes [start, end) of a shard.

    Raises DataError at once where trying again would not help (missing, forbidden, replaced), ShardError when
    nothing has come for long.
    """
    if start == end:  # a range that ends before it starts would be answered with the whole object
        return b""
    if not location.is_local:
        return asyncio.run_coroutine_threadsafe(Range(location, start, end).fetch(), get_loop()).result()

    def from_disk(filesystem: Any, path: str) -> bytes:
        content: bytes = filesystem.cat_file(path, start=start, end=end)
        if len(content) != end - start:
            raise EOFError(f"got {len(content)} of {end - start} bytes")
        STATS["local"] += len(content)
        if location.tag and stat(location).tag != location.tag:
            raise DataError(
                f"{location.url}: was changed since the run began; a run on other samples is another run: put"
                " it back, or start anew"
            )
        return content

    return Trouble(location, f"read bytes {start}-{end}").retry(from_disk)


def pour(location: Location, size: int, sink: Callable[[bytes], object]) -> None:
    """Give all bytes of an object to `sink`, piece by piece, from a server that gives no ranges. Raises as
    `read` does, and what `sink` raises."""
    reading = asyncio.run_coroutine_threadsafe(Whole(location, size, sink).fetch(), get_loop())
    try:
        reading.result()
    except SinkFailed as error:
        raise (error.__cause__ or error) from None
    except BaseException:
        reading.cancel()  # else it would go on in fsspec's thread after Ctrl-C
        raise
