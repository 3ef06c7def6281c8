"""Shards, through fsspec: local files, s3, https, hf, whatever it opens."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass

from botocore.exceptions import ClientError
from fsspec import AbstractFileSystem
from fsspec.asyn import get_loop
from fsspec.utils import glob_translate

from configs.errors import DataError
from data.location import Location, open_filesystem
from data.patience import Trouble, advice
from data.ranges import Range

TAGS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "xet_hash", "blob_id", "md5Hash")
"""What file systems call that which changes with the content."""


@dataclass(frozen=True)
class Stat:
    """Size in bytes, and a tag that changes when the content is replaced (ETag, or modification time)."""

    size: int
    tag: str


def stat(location: Location) -> Stat:
    """Size and tag of a shard. Raises DataError if it is not there or may not be read."""
    if (found := find(location)) is None:
        raise DataError(f"{location.url}: cannot read its size: it does not exist. {advice(location)}")
    return found


def find(location: Location) -> Stat | None:
    """Size and tag of an object, None if it is not there. Raises DataError if it may not be read."""

    def info() -> Stat | None:
        filesystem, path = open_filesystem(location)
        filesystem.invalidate_cache(filesystem._parent(path))
        try:
            found = filesystem.info(path)
        except FileNotFoundError as error:  # fsspec's http says so of any failure
            cause = error.__cause__
            if cause is None or isinstance(cause, (FileNotFoundError, ClientError)) or getattr(cause, "status", 0) in (404, 410):
                return None
            raise cause from None
        return Stat(int(found["size"] or 0), next((str(found[name]) for name in TAGS if found.get(name)), ""))

    return Trouble(location, "read its size").retry(info)


def glob(location: Location) -> list[Location]:
    """The objects that a URL with `*`, `?` or `[...]` matches."""

    def match() -> list[Location]:
        filesystem, path = open_filesystem(location)
        found = _glob(filesystem, path, local=location.is_local)
        return [Location(name if location.is_local else filesystem.unstrip_protocol(name), location.options) for name in found]

    return Trouble(location, "read the list of shards").retry(match)


def _glob(filesystem: AbstractFileSystem, path: str, *, local: bool) -> list[str]:
    """As the file system's own; which leaves out folders that cannot be listed where a folder's name is a pattern: here that is an error."""
    root, _, _ = re.split(r"[*?[]", path, maxsplit=1)[0].rpartition("/")
    if "/" not in path[len(root) + 1 :] or "http" in filesystem.protocol:
        return list(filesystem.glob(path))

    def fail(error: OSError) -> None:
        raise error

    files = [f"{folder}/{name}" for folder, _, names in os.walk(root, onerror=fail) for name in names] if local else filesystem.find(root)
    wanted = re.compile(glob_translate(path))
    return sorted(filter(wanted.match, files))


def read(location: Location, start: int, end: int) -> bytes:
    """Bytes [start, end) of a shard.

    Raises DataError at once where trying again would not help (missing, forbidden, replaced), ShardError when nothing has come for long.
    """
    if start == end:  # a range that ends before it starts would be answered with the whole object
        return b""
    if not location.is_local:
        return asyncio.run_coroutine_threadsafe(Range(location, start, end).fetch(), get_loop()).result()

    def from_disk() -> bytes:
        filesystem, path = open_filesystem(location)
        found: bytes = filesystem.cat_file(path, start=start, end=end)
        if len(found) != end - start:
            raise EOFError(f"got {len(found)} of {end - start} bytes")
        if location.tag and stat(location).tag != location.tag:
            raise DataError(f"{location.url}: was changed since the run began; a run on other samples is another run: put it back, or start anew")
        return found

    return Trouble(location, f"read bytes {start}-{end}").retry(from_disk)
