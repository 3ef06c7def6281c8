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
from collections.abc import Awaitable, Callable, Coroutine, Set
from typing import Any, TypeVar

from data import retry
from data.location import Location
from data.retry import STATS, Trouble, failures

T = TypeVar("T")
Answer = dict[str, Any]
Request = asyncio.Task[Answer]
PROGRESS = 256 << 10
"""Bytes that must have come for the time of trouble to begin anew."""
PIECE = 1 << 20
"""Bytes that are taken at once, at most: as a rule what has come meanwhile."""
WHOLE = 4 << 20
"""Bytes of a request to file systems other than S3, which give an answer only as a whole."""
LATE = 5
"""Times that it usually takes until an answer begins, after which a request counts as late."""


class Range:
    """Bytes [start, end) of an object on their way."""

    def __init__(self, location: Location, start: int, end: int) -> None:
        self.location, self.end = location, end
        self.position = start
        """The next byte that is wanted."""
        self._parts: list[bytes] = []
        self._trouble = Trouble(location, f"read bytes {start}-{end}")
        self._progress_from = start
        """Position at which progress was told last."""

    async def fetch(self) -> bytes:
        """All bytes of the range."""
        while self.position < self.end:
            began = self.position
            try:
                await self._request()
                if self.position < self.end:
                    raise EOFError(f"the answer ended {self.end - self.position} bytes too early")
            except failures() as error:
                await asyncio.sleep(self._trouble.failed(error))
                if self.position > began:
                    STATS["resumed"] += 1
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    def _take(self, part: bytes) -> None:
        if self.position + len(part) > self.end:
            raise EOFError(f"more came than bytes up to {self.end}: does this server know ranges?")
        self._parts.append(part)
        self.position += len(part)
        STATS["bytes"] += len(part)
        if self.position - self._progress_from >= PROGRESS:
            self._progress_from = self.position
            self._trouble.progressed()

    async def _request(self) -> None:
        """Ask once for what is missing, and take what comes."""
        STATS["requests"] += 1
        filesystem, path = self._trouble.open()
        if "s3" in filesystem.protocol:
            await self._stream(filesystem, path)
        else:
            await self._take_wholes(filesystem, path)

    async def _take_wholes(self, filesystem: Any, path: str) -> None:
        """Take WHOLE after WHOLE by the file system's own reads."""
        while self.position < self.end:
            end = min(self.end, self.position + WHOLE)
            seconds = retry.LIMITS.answer + (end - self.position) / retry.LIMITS.rate
            if filesystem.async_impl:
                reading = filesystem._cat_file(path, start=self.position, end=end)
            else:
                reading = asyncio.to_thread(filesystem.cat_file, path, start=self.position, end=end)
            part = await within(seconds, f"not whole within {seconds:.0f} s", reading)
            if len(part) != end - self.position:
                raise EOFError(
                    f"{len(part)} bytes came, not those from {self.position} to {end}: does this server know"
                    " ranges?"
                )
            self._take(part)

    async def _stream(self, filesystem: Any, path: str) -> None:
        """Take what comes by s3fs's client. Its own reads wrap that, but know neither If-Match nor a part of
        an answer."""
        bucket, key, version = filesystem.split_path(path)
        wanted = {"Bucket": bucket, "Key": key, "Range": f"bytes={self.position}-{self.end - 1}"}
        if version:
            wanted["VersionId"] = version
        if self.location.tag:
            wanted["IfMatch"] = self.location.tag
        client = await filesystem.set_session()
        answer = await _hedged(lambda: client.get_object(**filesystem.req_kw, **wanted))
        body = answer["Body"]
        try:
            if not str(answer.get("ContentRange", "")).startswith(f"bytes {self.position}-"):
                raise EOFError(f"the answer is of another range: {answer.get('ContentRange')}")
            await self._take_body(body)
        finally:
            body.close()

    async def _take_body(self, body: Any) -> None:
        """Take a body piece by piece. Raises TimeoutError where it stalls or comes too slowly."""
        stall = retry.LIMITS.stall
        window_began, bytes_before = time.monotonic(), self.position
        while self.position < self.end:
            part = await within(stall, f"no byte for {stall:.0f} s", body.read(PIECE))
            if not part:
                return
            self._take(part)
            now = time.monotonic()
            seconds, count = now - window_began, self.position - bytes_before
            if seconds > retry.LIMITS.window:
                if count < retry.LIMITS.rate * seconds:
                    raise TimeoutError(f"{count} bytes in {seconds:.0f} s are too slow")
                window_began, bytes_before = now, self.position


_answer_seconds: deque[float] = deque(maxlen=64)
"""Seconds until answers began, of late."""


async def _hedged(ask: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
    """The answer to a request, or to a second one like it where the first is late."""
    began, limits = time.monotonic(), retry.LIMITS
    late = limits.hedge
    if _answer_seconds:
        late = max(late, LATE * statistics.median(_answer_seconds))
    first = asyncio.create_task(ask())
    requests = {first}
    try:
        await asyncio.wait(requests, timeout=min(late, limits.answer))
        if not first.done():
            STATS["hedged"] += 1
            requests.add(asyncio.create_task(ask()))
        answered = await _first_answered(requests, began + limits.answer) or first
        answer = answered.result()
        requests.remove(answered)
        if answered is not first:
            STATS["hedge_won"] += 1
        _answer_seconds.append(time.monotonic() - began)
        return answer
    finally:
        for request in requests:
            _give_up(request)


async def _first_answered(requests: Set[Request], deadline: float) -> Request | None:
    """The first request that has an answer; None once all have failed. Raises TimeoutError at the deadline,
    in seconds of time.monotonic."""
    while True:
        for request in requests:
            if request.done() and not request.exception():
                return request
        waiting = {request for request in requests if not request.done()}
        if not waiting:
            return None
        seconds = deadline - time.monotonic()
        done, _ = await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise TimeoutError(f"no answer within {retry.LIMITS.answer:.0f} s")


def _give_up(request: Request) -> None:
    """Cancel a request; where its answer is there already, close that."""
    under_way = request.cancel()
    if not under_way and not request.cancelled() and not request.exception():
        request.result()["Body"].close()


async def within(seconds: float, otherwise: str, action: Awaitable[T]) -> T:
    """What an action gives. Raises TimeoutError, with the words `otherwise`, if it takes longer."""
    try:
        async with asyncio.timeout(seconds):
            return await action
    except TimeoutError as error:
        raise TimeoutError(str(error) or otherwise) from None
