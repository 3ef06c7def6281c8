"""A range of an object in a bucket, or wherever fsspec reaches: it comes whole and from the object that was
indexed, or the read fails and says why.

After a break the next request goes on at the byte that is missing. All waiting happens in fsspec's event
loop.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from data import patience
from data.location import Location
from data.patience import FAILURES, STATS, Trouble

T = TypeVar("T")
Answer = dict[str, Any]
PROGRESS = 256 << 10
"""Bytes that count as such."""
PIECE = 1 << 20
"""Bytes that are taken at once at most: as a rule what has come meanwhile."""
WHOLE = 4 << 20
"""Bytes of a request to other file systems, which give an answer as a whole only: it has to come within the
patience."""


class Range:
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
            except FAILURES as error:
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
        filesystem, path = self._trouble.open()
        if "s3" in filesystem.protocol:
            await self._stream(filesystem, path)
            return
        whole = (
            filesystem._cat_file
            if filesystem.async_impl
            else lambda *place, **limits: asyncio.to_thread(filesystem.cat_file, *place, **limits)
        )
        while self.position < self.end:
            end = min(self.end, self.position + WHOLE)
            seconds = patience.LIMITS.answer + (end - self.position) / patience.LIMITS.rate
            part = await within(
                seconds, f"not whole within {seconds:.0f} s", whole(path, start=self.position, end=end)
            )
            if len(part) != end - self.position:
                raise EOFError(
                    f"{len(part)} bytes came, not those from {self.position} to {end}: does this server know"
                    " ranges?"
                )
            self._take(part)

    async def _stream(self, filesystem: Any, path: str) -> None:
        """By s3fs's client, which its own reads wrap: they know neither If-Match nor a part of an answer."""
        bucket, key, version = filesystem.split_path(path)
        wanted = {
            "Bucket": bucket,
            "Key": key,
            "Range": f"bytes={self.position}-{self.end - 1}",
            **filesystem.req_kw,
        }
        wanted |= ({"VersionId": version} if version else {}) | (
            {"IfMatch": self.location.tag} if self.location.tag else {}
        )
        client = await filesystem.set_session()
        answer = await _hedged(lambda: client.get_object(**wanted))
        body = answer["Body"]
        try:
            if not str(answer.get("ContentRange", "")).startswith(f"bytes {self.position}-"):
                raise EOFError(f"the answer is of another range: {answer.get('ContentRange')}")
            since, count = time.monotonic(), 0
            while self.position < self.end:
                part = await within(
                    patience.LIMITS.stall, f"no byte for {patience.LIMITS.stall:.0f} s", body.read(PIECE)
                )
                if not part:
                    return
                self._take(part)
                count += len(part)
                if (now := time.monotonic()) - since > patience.LIMITS.window:
                    if count < patience.LIMITS.rate * (now - since):
                        raise TimeoutError(f"{count} bytes in {now - since:.0f} s are too slow")
                    since, count = now, 0
        finally:
            body.close()


_answers: deque[float] = deque(maxlen=64)
"""Seconds until answers began, of late."""


async def _hedged(ask: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
    """The answer to a request, or to a second one like it where the first is late."""
    began = time.monotonic()
    late = max(patience.LIMITS.hedge, 5 * statistics.median(_answers)) if _answers else patience.LIMITS.hedge
    first = asyncio.create_task(ask())
    tasks = {first}
    try:
        done, waiting = await asyncio.wait(tasks, timeout=min(late, patience.LIMITS.answer))
        if not done:
            STATS["hedged"] += 1
            tasks.add(asyncio.create_task(ask()))
        deadline = began + patience.LIMITS.answer
        while not any(task.done() and not task.exception() for task in tasks) and (
            waiting := {task for task in tasks if not task.done()}
        ):
            if not (
                await asyncio.wait(
                    waiting, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
                )
            )[0]:
                raise TimeoutError(f"no answer within {patience.LIMITS.answer:.0f} s")
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


async def within(seconds: float, otherwise: str, action: Awaitable[T]) -> T:
    """What an action gives. Raises TimeoutError that says what did not happen otherwise."""
    try:
        async with asyncio.timeout(seconds):
            return await action
    except TimeoutError as error:
        raise TimeoutError(str(error) or otherwise) from None
