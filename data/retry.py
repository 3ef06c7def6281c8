"""What is tried again, and for how long; and how often that was needed.

What passes (a connection that breaks, stalls or trickles, a busy server, a name that does not resolve) is
tried again until nothing more has come for `Limits.give_up` seconds; what does not pass (missing, forbidden,
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

from fsspec import AbstractFileSystem

from configs.disk import words_of_disk
from configs.errors import DataError, ShardError
from data.location import Location, open_filesystem, renew

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How long storage is waited for, in seconds, and how fast it must be."""

    answer: float = 10.0
    """Seconds until an answer begins."""
    stall: float = 10.0
    """Seconds between two pieces of a body."""
    window: float = 5.0
    """Seconds over which the rate is measured."""
    rate: float = 64e3
    """Bytes per second below which another connection is tried."""
    hedge: float = 1.0
    """Seconds before a second request is sent along with a first one that is late; at least five times the
    usual."""
    give_up: float = 100.0
    """Seconds without progress before it fails: fewer than a watchdog waits, so that the storage is named and
    not a hang."""
    warn: float = 10.0
    """Seconds of trouble before a warning."""
    first_pause: float = 0.2
    """Seconds, at most, before the second try; each failure doubles them, and a random part is waited."""
    longest_pause: float = 4.0
    """Seconds, at most, before any try."""


LIMITS = Limits()
STATS: Counter[str] = Counter()
"""Counts since this process began: requests, bytes, retries, resumed, hedged, hedge_won, reread, and bytes
from the cache (cached) and from this machine's file systems (local)."""


class Trouble:
    """What failed so far while one thing is done (`what`, as `read its size`), and whether it is tried
    again."""

    def __init__(self, location: Location, what: str) -> None:
        self.location, self.what = location, what
        self.failures, self.since = 0, time.monotonic()
        self._renewed = self._warned = False
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
        self.failures += 1
        STATS["retries"] += 1
        failure = f"{self.location.url}: cannot {self.what}"
        from data.verdicts import judge

        verdict = judge(error, self.location)
        if verdict.credentials and not self.location.is_local:
            renew(self.location, self._filesystem)
            if not self._renewed:
                self._renewed = True
                return 0.0
        if verdict.reason:
            raise DataError(f"{failure}: {verdict.reason}. {verdict.advice}".rstrip()) from error
        said = str(error).rstrip(".") or type(error).__name__
        if verdict.credentials:
            said += " (have the keys expired?)"
        if self.location.is_local:
            raise ShardError(f"{failure}: {words_of_disk(error) or said}") from error
        seconds = time.monotonic() - self.since
        if seconds > LIMITS.give_up:
            tried = f"{seconds:.0f} s without progress, {self.failures} failures, the last: {said}"
            raise ShardError(f"{failure}: {tried}. {advice(self.location)}") from error
        if seconds > LIMITS.warn and not self._warned:
            self._warned = True
            print(
                f"{failure} for {seconds:.0f} s now, and goes on trying for {LIMITS.give_up:.0f}: {said}",
                file=sys.stderr,
                flush=True,
            )
        doubled = LIMITS.first_pause * 2 ** min(self.failures, 10)
        return random.uniform(0, min(LIMITS.longest_pause, doubled))

    def retry(self, action: Callable[[Any, str], T]) -> T:
        """What an action gives with the file system and the path in it, tried again as long as `failed`
        allows. Raises what that raises."""
        while True:
            try:
                return action(*self.open())
            except failures() as error:
                time.sleep(self.failed(error))


def failures() -> tuple[type[Exception], ...]:
    """Failures of file systems, which may pass. As `except failures()` they are looked up when something has
    failed."""
    from data.verdicts import FAILURES

    return FAILURES


def received() -> int:
    """Bytes that have come since this process began, from wherever: as long as they do, nothing hangs."""
    return STATS["bytes"] + STATS["cached"] + STATS["local"]


_GOOGLE = (
    "Check bucket and name, and the credentials (`gcloud auth application-default login`, or"
    " GOOGLE_APPLICATION_CREDENTIALS)."
)
_AZURE = (
    "Check container and name, and the credentials (AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY,"
    " or AZURE_STORAGE_CONNECTION_STRING)."
)
ADVICE = {
    **dict.fromkeys(("file", "local"), "Check the path, and that this machine sees that file system."),
    **dict.fromkeys(
        ("s3", "s3a"),
        "Check bucket and name, the credentials (AWS_ACCESS_KEY_ID, or a profile), the region and the"
        " endpoint (AWS_ENDPOINT_URL).",
    ),
    "hf": (
        "Check owner, repository, revision and file (hf://datasets/OWNER/NAME@REVISION/FILE); what is private"
        " or gated wants HF_TOKEN, of an account that has accepted its terms on its page."
    ),
    **dict.fromkeys(("gs", "gcs"), _GOOGLE),
    **dict.fromkeys(("az", "abfs", "abfss"), _AZURE),
}
"""What to look at where something is missing or forbidden, by protocol."""


def advice(location: Location) -> str:
    """What to look at where something is missing or forbidden."""
    return ADVICE.get(location.protocol, "Check the URL, and that this machine reaches it.")
