"""Byte ranges of shards, through fsspec: local files, s3, https, hf, whatever it opens.

A range either comes whole and from the object that was indexed, or the read fails and says why. What passes (a connection that breaks,
stalls or trickles, a busy server, a name that does not resolve) is tried again, from the byte that is missing, until nothing more has come
for `Limits.patience`; what does not pass (missing, forbidden, replaced) fails at once. All waiting happens in fsspec's event loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

import fsspec
from aiohttp import ClientError as HttpError
from aiohttp import ClientResponseError
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, ProfileNotFound
from botocore.parsers import ResponseParserError
from fsspec import AbstractFileSystem
from fsspec.asyn import get_loop
from fsspec.core import split_protocol
from fsspec.utils import glob_translate

from configs.errors import DataError, ShardError

T = TypeVar("T")
Answer = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What is waited for, in seconds and bytes."""

    answer: float = 10.0
    """Until an answer begins."""
    stall: float = 10.0
    """Between two pieces of a body."""
    window: float = 5.0
    rate: float = 64e3
    """Bytes per second, over `window`, below which another connection is tried."""
    hedge: float = 1.0
    """Before a second request is sent along with a first one that is late; at least five times the usual."""
    patience: float = 100.0
    """Without PROGRESS more bytes, before a read fails: less than a watchdog's, so that the storage is named and not a hang."""
    tell: float = 10.0
    """Of trouble, after which it is told of."""
    pause: tuple[float, float] = (0.2, 4.0)
    """After a first failure, and the longest; each failure doubles it, and a random part of it is waited."""


LIMITS = Limits()
TAGS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "xet_hash", "blob_id", "md5Hash")
"""What file systems call that which changes with the content."""
PROGRESS = 256 << 10
PIECE = 1 << 20
"""Bytes that are taken at once at most: as a rule what has come meanwhile."""
WHOLE = 4 << 20
"""Bytes of a request to other file systems, which give an answer as a whole only: it has to come within the patience."""
CONNECTIONS = 64
"""To one endpoint: those of all readers, and their second requests."""
STATS: Counter[str] = Counter()
"""Since this process began: requests, bytes, retries, resumed, hedged, hedge_won, reread, and cached (bytes)."""
PASSING = (OSError, EOFError, BotoCoreError, ClientError, HttpError, ResponseParserError)
NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound)
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed"}


@dataclass(frozen=True)
class Location:
    """One shard: its URL, the options that open it, as JSON, and what is wanted of its content: tag (as `Stat.tag`; empty: whatever is there) and size."""

    url: str
    options: str = "{}"
    tag: str = field(default="", compare=False)
    size: int = field(default=0, compare=False)

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


def stat(location: Location) -> Stat:
    """Size and tag of a shard. Raises DataError if it is not there or may not be read."""
    if (found := find(location)) is None:
        raise DataError(f"{location.url}: cannot read its size: it does not exist. {_advice(location)}")
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

    return retry(location, "read its size", info)


def glob(location: Location) -> list[Location]:
    """The objects that a URL with `*`, `?` or `[...]` matches."""

    def match() -> list[Location]:
        filesystem, path = open_filesystem(location)
        found = _glob(filesystem, path, local=location.is_local)
        return [Location(name if location.is_local else filesystem.unstrip_protocol(name), location.options) for name in found]

    return retry(location, "read the list of shards", match)


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
        return asyncio.run_coroutine_threadsafe(_Range(location, start, end).fetch(), get_loop()).result()

    def from_disk() -> bytes:
        filesystem, path = open_filesystem(location)
        found: bytes = filesystem.cat_file(path, start=start, end=end)
        if len(found) != end - start:
            raise EOFError(f"got {len(found)} of {end - start} bytes")
        if location.tag and stat(location).tag != location.tag:
            raise DataError(f"{location.url}: was changed since the run began; a run on other samples is another run: put it back, or start anew")
        return found

    return retry(location, f"read bytes {start}-{end}", from_disk)


_open: dict[tuple[str, str], AbstractFileSystem] = {}
_opening = Lock()


def open_filesystem(location: Location) -> tuple[AbstractFileSystem, str]:
    """File system of a location and the path in it."""
    protocol = split_protocol(location.url)[0] or "file"
    with _opening:
        filesystem = _open.get((protocol, location.options))
        if filesystem is None:
            given = json.loads(location.options)
            if protocol in ("s3", "s3a"):
                # botocore's own retries would multiply with ours; its pool of 10 connections would hold readers back.
                timeouts = {"connect_timeout": LIMITS.answer, "read_timeout": 6 * LIMITS.stall}
                config = {"retries": {"total_max_attempts": 1}, "max_pool_connections": CONNECTIONS, **timeouts}
                given["config_kwargs"] = {**config, **given.get("config_kwargs", {})}
            try:
                filesystem = fsspec.filesystem(protocol, skip_instance_cache=True, **given)
            except (ValueError, ImportError) as error:
                raise DataError(f"{location.url}: {error}") from None
            _open[protocol, location.options] = filesystem
    return filesystem, filesystem._strip_protocol(location.url)


def _renew(location: Location) -> None:
    """Open the file system anew at the next use: keys may have been changed meanwhile."""
    with _opening:
        _open.pop((split_protocol(location.url)[0] or "file", location.options), None)


class Trouble:
    """Of one thing that is done: what failed so far, and whether it is tried again."""

    def __init__(self, location: Location, what: str) -> None:
        self.location, self.what = location, what
        self.failures, self.since = 0, time.monotonic()
        self.renewed = self.told = False

    def progressed(self) -> None:
        """Enough has come that the time begins anew."""
        self.since, self.failures = time.monotonic(), self.failures // 2

    def failed(self, error: Exception) -> float:
        """Seconds to wait before the next try. Raises DataError for what does not pass, ShardError once it lasts too long."""
        place = f"{self.location.url}: cannot {self.what}"
        self.failures += 1
        STATS["retries"] += 1
        reason, credentials = _final(error)
        if credentials and not self.renewed and not self.location.is_local:
            self.renewed = True
            _renew(self.location)
            return 0.0
        if reason:
            raise DataError(f"{place}: {reason}. {_advice(self.location)}") from error
        said, waited = str(error) or type(error).__name__, time.monotonic() - self.since
        if self.location.is_local or waited > LIMITS.patience:
            raise ShardError(
                f"{place}: {f'{waited:.0f} s without progress, {self.failures} failures, the last: ' * (not self.location.is_local)}{said}"
            ) from error
        if waited > LIMITS.tell and not self.told:
            self.told = True
            print(f"{place} for {waited:.0f} s now, and goes on trying for {LIMITS.patience:.0f}: {said}", file=sys.stderr, flush=True)
        return random.uniform(0, min(LIMITS.pause[1], LIMITS.pause[0] * 2 ** min(self.failures, 10)))

    def through(self, action: Callable[[], T]) -> T:
        """The result of an action, tried again as long as `failed` allows."""
        while True:
            try:
                return action()
            except PASSING as error:
                time.sleep(self.failed(error))


def retry(location: Location, what: str, action: Callable[[], T]) -> T:
    """The result of an action, as `read its size`, that is tried again while what hinders it may pass.

    Raises DataError where trying again would not help, ShardError when it has not helped for long.
    """
    return Trouble(location, what).through(action)


class _Range:
    """Bytes [start, end) of an object on their way."""

    def __init__(self, location: Location, start: int, end: int) -> None:
        self.location, self.end = location, end
        self.position = start
        """Of the next byte that is wanted."""
        self._parts: list[bytes] = []
        self._trouble, self._mark = Trouble(location, f"read bytes {start}-{end}"), start

    async def fetch(self) -> bytes:
        """All of it."""
        while self.position < self.end:
            began = self.position
            try:
                await self._request()
                if self.position < self.end:
                    raise EOFError(f"the answer ended {self.end - self.position} bytes too early")
            except PASSING as error:
                await asyncio.sleep(self._trouble.failed(error))
                STATS["resumed"] += self.position > began
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    def _take(self, part: bytes) -> None:
        if self.position + len(part) > self.end:
            raise EOFError(f"more came than bytes up to {self.end}: does this server know ranges?")
        self._parts.append(part)
        self.position += len(part)
        STATS["bytes"] += len(part)
        if self.position - self._mark >= PROGRESS:
            self._mark = self.position
            self._trouble.progressed()

    async def _request(self) -> None:
        """Ask once for what is missing, and take what comes."""
        STATS["requests"] += 1
        filesystem, path = open_filesystem(self.location)
        if "s3" in filesystem.protocol:
            await self._stream(filesystem, path)
            return
        whole = filesystem._cat_file if filesystem.async_impl else lambda *place, **limits: asyncio.to_thread(filesystem.cat_file, *place, **limits)
        while self.position < self.end:
            end = min(self.end, self.position + WHOLE)
            seconds = LIMITS.answer + (end - self.position) / LIMITS.rate
            part = await _within(seconds, f"not whole within {seconds:.0f} s", whole(path, start=self.position, end=end))
            if len(part) != end - self.position:
                raise EOFError(f"{len(part)} bytes came, not those from {self.position} to {end}: does this server know ranges?")
            self._take(part)

    async def _stream(self, filesystem: Any, path: str) -> None:
        """By s3fs's client, which its own reads wrap: they know neither If-Match nor a part of an answer."""
        bucket, key, version = filesystem.split_path(path)
        wanted = {"Bucket": bucket, "Key": key, "Range": f"bytes={self.position}-{self.end - 1}", **filesystem.req_kw}
        wanted |= ({"VersionId": version} if version else {}) | ({"IfMatch": self.location.tag} if self.location.tag else {})
        client = await filesystem.set_session()
        answer = await _hedged(lambda: client.get_object(**wanted))
        body = answer["Body"]
        try:
            if not str(answer.get("ContentRange", "")).startswith(f"bytes {self.position}-"):
                raise EOFError(f"the answer is of another range: {answer.get('ContentRange')}")
            since, count = time.monotonic(), 0
            while self.position < self.end:
                part = await _within(LIMITS.stall, f"no byte for {LIMITS.stall:.0f} s", body.read(PIECE))
                if not part:
                    return
                self._take(part)
                count += len(part)
                if (now := time.monotonic()) - since > LIMITS.window:
                    if count < LIMITS.rate * (now - since):
                        raise TimeoutError(f"{count} bytes in {now - since:.0f} s are too slow")
                    since, count = now, 0
        finally:
            body.close()


_answers: deque[float] = deque(maxlen=64)
"""Seconds until answers began, of late."""


async def _hedged(ask: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
    """The answer to a request, or to a second one like it where the first is late."""
    began = time.monotonic()
    late = max(LIMITS.hedge, 5 * statistics.median(_answers)) if _answers else LIMITS.hedge
    first = asyncio.create_task(ask())
    tasks = {first}
    try:
        done, waiting = await asyncio.wait(tasks, timeout=min(late, LIMITS.answer))
        if not done:
            STATS["hedged"] += 1
            tasks.add(asyncio.create_task(ask()))
        deadline = began + LIMITS.answer
        while not any(task.done() and not task.exception() for task in tasks) and (waiting := {task for task in tasks if not task.done()}):
            if not (await asyncio.wait(waiting, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED))[0]:
                raise TimeoutError(f"no answer within {LIMITS.answer:.0f} s")
        good = next((task for task in tasks if task.done() and not task.exception()), first)
        tasks.remove(good)
        answer = good.result()
        STATS["hedge_won"] += good is not first
        _answers.append(time.monotonic() - began)
        return answer
    finally:
        for task in tasks:
            if not task.cancel() and not task.cancelled() and not task.exception():
                task.result()["Body"].close()


async def _within(seconds: float, otherwise: str, action: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(seconds):
            return await action
    except TimeoutError as error:
        raise TimeoutError(str(error) or otherwise) from None


def _final(error: Exception) -> tuple[str, bool]:
    """Why trying again would not help, empty if it may; and whether other credentials might."""
    status, code = 0, ""
    cause = error if isinstance(error, (ClientError, ClientResponseError)) else error.__cause__
    if isinstance(cause, ClientError):
        status, code = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), cause.response.get("Error", {}).get("Code", "")
    elif isinstance(cause, ClientResponseError):
        status = cause.status
    if status == 412:
        return (
            "it was replaced since it was indexed (its ETag is another one): index it again with `python -m tools.index`, or start `tools.stage` again",
            False,
        )
    if status == 416:
        return "it is shorter than it was when it was indexed: index it again with `python -m tools.index`", False
    if code == "400":  # a HEAD, whose answer has no body that says more; it may be an expired token
        return "", True
    if status in (401, 403) or code in EXPIRED or isinstance(error, PermissionError):
        return f"access denied ({' '.join(filter(None, [str(status or ''), code])) or error})", True
    if status == 404 or isinstance(error, FileNotFoundError):
        return "it does not exist" + (f" ({code})" if code not in ("", "404", "NoSuchKey") else ""), False
    if isinstance(error, NO_CREDENTIALS):
        return str(error), True
    return (str(error), False) if isinstance(error, IsADirectoryError) else ("", False)


def _advice(location: Location) -> str:
    if location.is_local:
        return "Check the path, and that this machine sees that file system."
    return "Check bucket and name, the credentials (AWS_ACCESS_KEY_ID, or a profile), the region and the endpoint (AWS_ENDPOINT_URL)."
