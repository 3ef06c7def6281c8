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

from configs.errors import DataError
from data import retry
from data.kinds import BEGINNING, what_it_is
from data.location import Location
from data.retry import STATS, Trouble, advice, failures

T = TypeVar("T")
Answer = dict[str, Any]
Request = asyncio.Task[Answer]
PROGRESS = 256 << 10
"""Bytes that must have come for the time of trouble to begin anew."""
PIECE = 1 << 20
"""Bytes that are taken at once, at most: as a rule what has come meanwhile."""
WHOLE = 4 << 20
"""Bytes of a request to file systems other than S3 and HTTP, which give an answer only as a whole."""
WHOLES = 3
"""Answers with the whole object after which a server counts as one that gives no ranges."""
LATE = 5
"""Times that it usually takes until an answer begins, after which a request counts as late."""


class NoRanges(DataError):
    """A server gives objects only as a whole."""


class SinkFailed(Exception):
    """What takes the bytes has failed, not the storage; its error is the cause."""


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
        self._wholes = 0
        """Answers that were the whole object."""

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

    async def _keep(self, part: bytes) -> None:
        self._parts.append(part)

    async def _take(self, part: bytes) -> None:
        if self.position + len(part) > self.end:
            raise EOFError(f"more came than bytes up to {self.end}")
        await self._keep(part)
        self.position += len(part)
        STATS["bytes"] += len(part)
        if self.position - self._progress_from >= PROGRESS:
            self._progress_from = self.position
            self._trouble.progressed()

    async def _request(self) -> None:
        """Ask once for what is missing, and take what comes."""
        STATS["requests"] += 1
        filesystem, path = self._trouble.open()
        if self.location.is_s3:
            await self._stream_s3(filesystem, path)
        elif self.location.is_http:
            await self._stream_http(filesystem, path)
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
            if len(part) > end - self.position:
                self._whole_came(part)
            if len(part) != end - self.position:
                raise EOFError(f"{len(part)} bytes came, not those from {self.position} to {end}")
            await self._take(part)

    def _asked(self) -> dict[str, str]:
        """What is asked for, as a header."""
        return {"Range": f"bytes={self.position}-{self.end - 1}"}

    async def _stream_s3(self, filesystem: Any, path: str) -> None:
        """Take what comes by s3fs's client. Its own reads wrap that, but know neither If-Match nor a part of
        an answer."""
        bucket, key, version = filesystem.split_path(path)
        wanted = {"Bucket": bucket, "Key": key, **self._asked()}
        if version:
            wanted["VersionId"] = version
        if self.location.tag:
            wanted["IfMatch"] = self.location.tag
        await filesystem.set_session()
        get = (await filesystem.get_s3(bucket)).get_object
        options = filesystem._get_s3_method_kwargs(get, filesystem.req_kw, **wanted)
        answer = await _hedged(lambda: get(**options))
        body = answer["Body"]
        try:
            await self._take_answer(body, answer.get("ContentRange"))
        finally:
            body.close()

    async def _stream_http(self, filesystem: Any, path: str) -> None:
        """Take what comes by the session of fsspec's file system, whose own reads hold a whole answer in
        memory."""
        from aiohttp import ClientTimeout

        options = dict(filesystem.kwargs)
        headers = {"Accept-Encoding": "identity", **options.pop("headers", {}), **self._asked()}
        options |= {"headers": headers, "timeout": ClientTimeout(total=None)}
        session = await filesystem.set_session()
        limit = retry.LIMITS.answer
        asking = session.get(filesystem.encode_url(path), **options)
        answer = await within(limit, f"no answer within {limit:.0f} s", asking)
        try:
            answer.raise_for_status()
            await self._take_answer(answer.content, answer.headers.get("Content-Range"))
        finally:
            answer.close()

    async def _take_answer(self, body: Any, content_range: str | None) -> None:
        """Take the body of an answer. content_range: its header, which says what it is of."""
        if not content_range:
            self._whole_came(await within(retry.LIMITS.stall, "no byte of the answer", body.read(BEGINNING)))
            raise EOFError("the answer is the whole object, not a range of it")
        if not content_range.startswith(f"bytes {self.position}-"):
            raise EOFError(f"the answer is of another range: {content_range}")
        await self._take_body(body)

    def _whole_came(self, beginning: bytes) -> None:
        """Count an answer that is the whole object. Raises NoRanges for the third: a cache on the way may
        give one."""
        self._wholes += 1
        if self._wholes < WHOLES:
            return
        failure = f"{self.location.url}: cannot read bytes {self.position}-{self.end}"
        kind = what_it_is(beginning)
        if kind not in ("", "a tar archive"):
            raise DataError(f"{failure}: what comes instead is {kind}. {advice(self.location)}")
        raise NoRanges(
            f"{failure}: this server gives no ranges, only whole objects: copy the shards to a disk with"
            " `python -m tools.stage SHARDS... DIR`, or by hand, and train on the copies"
        )

    async def _take_body(self, body: Any, skipped: int = 0) -> None:
        """Take a body piece by piece, without so many bytes of its beginning. Raises TimeoutError where it
        stalls or comes too slowly."""
        stall = retry.LIMITS.stall
        window_began, count = time.monotonic(), 0
        while self.position < self.end:
            part = await within(stall, f"no byte for {stall:.0f} s", body.read(PIECE))
            if not part:
                return
            count += len(part)
            wanted = part[skipped:]
            skipped -= len(part) - len(wanted)
            if wanted:
                await self._take(wanted)
            now = time.monotonic()
            seconds = now - window_began
            if seconds > retry.LIMITS.window:
                if count < retry.LIMITS.rate * seconds:
                    raise TimeoutError(f"{count} bytes in {seconds:.0f} s are too slow")
                window_began, count = now, 0


class Whole(Range):
    """An object of so many bytes, from a server that gives no ranges: after a break all comes again, and what
    was there is passed over."""

    def __init__(self, location: Location, size: int, sink: Callable[[bytes], object]) -> None:
        super().__init__(location, 0, size)
        self._sink = sink

    async def _keep(self, part: bytes) -> None:
        try:
            await asyncio.to_thread(self._sink, part)
        except Exception as error:
            raise SinkFailed from error

    def _asked(self) -> dict[str, str]:
        return {}

    async def _take_answer(self, body: Any, content_range: str | None) -> None:
        await self._take_body(body, self.position)


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
