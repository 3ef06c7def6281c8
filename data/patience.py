"""What is waited for, what is tried again, and for how long; and how often it was needed.

What passes (a connection that breaks, stalls or trickles, a busy server, a name that does not resolve) is
tried again until nothing more has come for `Limits.patience`; what does not pass (missing, forbidden,
replaced) fails at once.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from aiohttp import ClientError as HttpError
from aiohttp import ClientResponseError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.parsers import ResponseParserError
from fsspec import AbstractFileSystem
from huggingface_hub.errors import HfHubHTTPError

from configs.errors import DataError, ShardError
from data.location import Location, open_filesystem, renew

T = TypeVar("T")


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
    """Without progress, before it fails: less than a watchdog's, so that the storage is named and not a
    hang."""
    tell: float = 10.0
    """Of trouble, after which it is told of."""
    pause: tuple[float, float] = (0.2, 4.0)
    """After a first failure, and the longest; each failure doubles it, and a random part of it is waited."""


LIMITS = Limits()
STATS: Counter[str] = Counter()
"""Since this process began: requests, bytes, retries, resumed, hedged, hedge_won, reread, and the bytes that
came from the cache (cached) and from this machine's file systems (local)."""
HubError: type[Exception] = HfHubHTTPError.__bases__[0]
"""The HTTPError of httpx or httpx2, whichever this huggingface_hub has."""
FAILURES: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    BotoCoreError,
    ClientError,
    HttpError,
    HubError,
    ResponseParserError,
    ValueError,
    TypeError,
)
"""Of file systems; whether one passes `_final` says."""
NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound)
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
"""These pass when whoever changes the keys has done so."""
REFUSED = {"InvalidToken", "AuthorizationHeaderMalformed"}
"""Denied, although the status is 400."""


class Trouble:
    """Of one thing that is done, as `read its size`: what failed so far, and whether it is tried again."""

    def __init__(self, location: Location, what: str) -> None:
        self.location, self.what = location, what
        self.failures, self.since = 0, time.monotonic()
        self.renewed = self.told = False
        self._filesystem: AbstractFileSystem | None = None

    def open(self) -> tuple[AbstractFileSystem, str]:
        """As `open_filesystem`; each try takes what that gives now."""
        self._filesystem, path = open_filesystem(self.location)
        return self._filesystem, path

    def progressed(self) -> None:
        """Enough has come that the time begins anew."""
        self.since, self.failures = time.monotonic(), self.failures // 2

    def failed(self, error: Exception) -> float:
        """Seconds to wait before the next try. Raises DataError for what does not pass, ShardError once it
        lasts too long."""
        place = f"{self.location.url}: cannot {self.what}"
        self.failures += 1
        STATS["retries"] += 1
        reason, credentials = _final(error)
        if credentials and not self.location.is_local:
            renew(self.location, self._filesystem)
            if not self.renewed:
                self.renewed = True
                return 0.0
        if reason:
            raise DataError(f"{place}: {reason}. {advice(self.location)}") from error
        said, waited = str(error) or type(error).__name__, time.monotonic() - self.since
        said += " (have the keys expired?)" * credentials
        if self.location.is_local:
            raise ShardError(f"{place}: {said}") from error
        if waited > LIMITS.patience:
            tried = f"{waited:.0f} s without progress, {self.failures} failures, the last: {said}"
            raise ShardError(f"{place}: {tried}. {advice(self.location)}") from error
        if waited > LIMITS.tell and not self.told:
            self.told = True
            print(
                f"{place} for {waited:.0f} s now, and goes on trying for {LIMITS.patience:.0f}: {said}",
                file=sys.stderr,
                flush=True,
            )
        return random.uniform(0, min(LIMITS.pause[1], LIMITS.pause[0] * 2 ** min(self.failures, 10)))

    def retry(self, action: Callable[[Any, str], T]) -> T:
        """What an action gives with the file system and the path in it, tried again as long as `failed`
        allows. Raises what that raises."""
        while True:
            try:
                return action(*self.open())
            except FAILURES as error:
                time.sleep(self.failed(error))


def received() -> int:
    """Bytes that have come since this process began, from wherever: as long as they do, nothing hangs."""
    return STATS["bytes"] + STATS["cached"] + STATS["local"]


def _final(error: Exception) -> tuple[str, bool]:
    """Why trying again would not help, empty if it may; and whether other credentials might."""
    status, code = int(getattr(getattr(error, "response", None), "status_code", 0)), ""  # as HubError has it
    cause = error if isinstance(error, (ClientError, ClientResponseError)) else error.__cause__
    if isinstance(cause, ClientError):
        status, code = (
            cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0),
            cause.response.get("Error", {}).get("Code", ""),
        )
    elif isinstance(cause, ClientResponseError):
        status = cause.status
    if status == 412:
        return (
            (
                "it was replaced since it was indexed (its ETag is another one): index it again with `python"
                " -m tools.index`, or start `tools.stage` again"
            ),
            False,
        )
    if status == 416:
        return (
            "it is shorter than it was when it was indexed: index it again with `python -m tools.index`",
            False,
        )
    if (
        code in EXPIRED or code == "400"
    ):  # 400 of a HEAD, whose answer has no body that says more, may be the same
        return "", True
    if status in (401, 403) or code in REFUSED or isinstance(error, PermissionError):
        return (
            f"access denied ({' '.join(dict.fromkeys(filter(None, [str(status or ''), code]))) or error})",
            True,
        )
    if status == 404 or isinstance(error, FileNotFoundError):
        return "it does not exist" + (f" ({code})" if code not in ("", "404", "NoSuchKey") else ""), False
    if isinstance(error, NO_CREDENTIALS):
        return str(error), True
    if isinstance(
        error, (IsADirectoryError, ParamValidationError, ValueError, TypeError)
    ):  # the last two: of an endpoint, or an option, that is none
        return " ".join(str(error).split()), False
    return "", False


def advice(location: Location) -> str:
    """What to look at where something is missing or forbidden."""
    if location.is_local:
        return "Check the path, and that this machine sees that file system."
    return (
        "Check bucket and name, the credentials (AWS_ACCESS_KEY_ID, or a profile), the region and the"
        " endpoint (AWS_ENDPOINT_URL)."
    )
