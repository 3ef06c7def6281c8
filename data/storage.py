"""Byte ranges of shards, through fsspec: local files, s3, https, hf, whatever it opens."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import fsspec
from aiohttp import ClientError, ClientResponseError
from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError, ProfileNotFound
from fsspec import AbstractFileSystem
from fsspec.core import split_protocol

from configs.errors import DataError, ShardError

TRIES = 6
"""Attempts at one range before the read fails; pauses double from 0.2 s, with jitter, about 6 s in all."""
FATAL = (FileNotFoundError, PermissionError, IsADirectoryError, NoCredentialsError, PartialCredentialsError, ProfileNotFound)
PASSING = (OSError, EOFError, BotoCoreError, ClientError)


@dataclass(frozen=True)
class Location:
    """One shard: its URL and the options that open it, as JSON."""

    url: str
    options: str = "{}"

    @property
    def name(self) -> str:
        """File name, as `audioset-000012.tar`."""
        path = self.url.partition("?")[0] if self.url.startswith("http") else self.url
        return path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        """Whether the shard lies in this machine's file system."""
        return split_protocol(self.url)[0] in (None, "file", "local")


@dataclass(frozen=True)
class Stat:
    """Size in bytes, and a tag that changes when the content is replaced (ETag, or modification time)."""

    size: int
    tag: str


@lru_cache(maxsize=64)
def _filesystem(protocol: str, options: str) -> AbstractFileSystem:
    given = json.loads(options)
    if protocol in ("s3", "s3a"):
        # botocore's own retries would multiply with ours; its pool of 10 connections would hold readers back.
        given["config_kwargs"] = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 64, **given.get("config_kwargs", {})}
    return fsspec.filesystem(protocol, **given)


def open_filesystem(location: Location) -> tuple[AbstractFileSystem, str]:
    """File system of a location and the path in it."""
    protocol, _ = split_protocol(location.url)
    try:
        filesystem = _filesystem(protocol or "file", location.options)
    except (ValueError, ImportError) as error:
        raise DataError(f"{location.url}: {error}") from None
    return filesystem, filesystem._strip_protocol(location.url)


def stat(location: Location) -> Stat:
    """Size and tag of a shard. Raises DataError if it is not there or may not be read."""

    def info() -> Stat:
        filesystem, path = open_filesystem(location)
        filesystem.invalidate_cache(filesystem._parent(path))
        found = filesystem.info(path)
        return Stat(int(found["size"] or 0), str(found.get("ETag") or found.get("mtime") or found.get("LastModified") or ""))

    return _retry(location, "its size", info)


def glob(location: Location) -> list[Location]:
    """The objects that a URL with `*`, `?` or `[...]` matches."""

    def match() -> list[Location]:
        filesystem, path = open_filesystem(location)
        found = filesystem.glob(path)
        return [Location(name if location.is_local else filesystem.unstrip_protocol(name), location.options) for name in found]

    return _retry(location, "the list of shards", match)


def read(location: Location, start: int, end: int) -> bytes:
    """Bytes [start, end) of a shard.

    Raises DataError at once where trying again would not help (missing, forbidden), ShardError after TRIES failures.
    """

    def fetch() -> bytes:
        filesystem, path = open_filesystem(location)
        found = filesystem.cat_file(path, start=start, end=end)
        if len(found) != end - start:
            raise EOFError(f"got {len(found)} of {end - start} bytes")
        return found

    if start == end:  # a range that ends before it starts would be answered with the whole object
        return b""
    return _retry(location, f"bytes {start}-{end}", fetch)


def _retry(location: Location, what: str, action: Any) -> Any:
    for tries in range(1, TRIES + 1):
        try:
            return action()
        except FATAL as error:
            raise DataError(f"{location.url}: cannot read {what}: {_reason(error)}. {_advice(location)}") from error
        except PASSING as error:
            if isinstance(error, ClientResponseError) and error.status in (401, 403):
                raise DataError(f"{location.url}: cannot read {what}: access denied ({error.status}). {_advice(location)}") from error
            if location.is_local or tries == TRIES:
                raise ShardError(f"{location.url}: cannot read {what} after {tries} tries: {error}") from error
            time.sleep(random.uniform(0, 0.2 * 2**tries))
    raise AssertionError("unreachable")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    return f"access denied ({error})" if isinstance(error, PermissionError) else str(error)


def _advice(location: Location) -> str:
    if location.is_local:
        return "Check the path, and that this machine sees that file system."
    return "Check bucket and name, the credentials (AWS_ACCESS_KEY_ID, or a profile), the region and the endpoint (AWS_ENDPOINT_URL)."
