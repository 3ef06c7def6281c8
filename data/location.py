"""Where a shard lies, and the file system that opens it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.core import split_protocol

from configs.errors import DataError

CONNECTIONS = 64
"""Connections to one endpoint: those of all readers, and their second requests."""
# botocore's own retries would multiply with ours; its pool of 10 connections would hold readers back.
S3 = {
    "retries": {"total_max_attempts": 1},
    "max_pool_connections": CONNECTIONS,
    "connect_timeout": 10,
    "read_timeout": 60,
}


@dataclass(frozen=True)
class Location:
    """One shard: its URL, the options that open it, as JSON, and what is wanted of its content: tag (as
    `Stat.tag`; empty: whatever is there) and size."""

    url: str
    options: str = "{}"
    tag: str = field(default="", compare=False)
    size: int = field(default=0, compare=False)

    @property
    def name(self) -> str:
        """File name, as `audioset-000012.tar`."""
        path = self.url.partition("?")[0] if self.is_http else self.url
        return path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def protocol(self) -> str:
        """What opens it, as `s3`."""
        return split_protocol(self.url)[0] or "file"

    @property
    def is_local(self) -> bool:
        """Whether the shard lies in this machine's file system."""
        return self.protocol in ("file", "local")

    @property
    def is_s3(self) -> bool:
        """Whether the shard lies in a bucket that speaks S3."""
        return self.protocol in ("s3", "s3a")

    @property
    def is_http(self) -> bool:
        """Whether the shard is on a web server."""
        return self.protocol in ("http", "https")


_open: dict[tuple[str, str], AbstractFileSystem] = {}
_opening = Lock()


def open_filesystem(location: Location) -> tuple[AbstractFileSystem, str]:
    """File system of a location and the path in it."""
    which = location.protocol, location.options
    with _opening:
        filesystem = _open.get(which)
        if filesystem is None:
            given = json.loads(location.options)
            if location.is_s3:
                given["config_kwargs"] = {**S3, **given.get("config_kwargs", {})}
            if location.is_http:
                given["client_kwargs"] = {
                    "raise_for_status": _lead_somewhere,
                    **given.get("client_kwargs", {}),
                }
            try:
                filesystem = fsspec.filesystem(location.protocol, skip_instance_cache=True, **given)
            except (ValueError, ImportError) as error:
                raise DataError(f"{location.url}: {error}") from None
            _open[which] = filesystem
    return filesystem, filesystem._strip_protocol(location.url)


async def _lead_somewhere(answer: Any) -> None:
    """Raise for a redirect that leads nowhere, as S3's to another region; aiohttp takes it for the object."""
    if 300 <= answer.status < 400:
        from aiohttp import ClientResponseError

        raise ClientResponseError(
            answer.request_info, answer.history, status=answer.status, headers=answer.headers
        )


def renew(location: Location, refused: AbstractFileSystem | None) -> None:
    """Open the file system anew at the next use, if it is still the one that was refused: keys may have been
    changed meanwhile."""
    with _opening:
        which = location.protocol, location.options
        if _open.get(which) is refused:
            _open.pop(which, None)
