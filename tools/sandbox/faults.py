"""A proxy before an S3 server that does to its answers what networks and busy servers do, as told."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from urllib.parse import urlsplit

from configs.errors import ConfigError

CHUNK = 64 << 10
STATUS = {
    "400": ("Bad Request", "ExpiredToken"),
    "403": ("Forbidden", "AccessDenied"),
    "404": ("Not Found", "NoSuchKey"),
    "500": ("Internal Server Error", "InternalError"),
    "503": ("Service Unavailable", "SlowDown"),
}
KINDS = {
    "reset": "the connection is reset, after so many bytes of the body",
    "close": "it is closed, as if that were the end",
    "stall": "nothing more comes for so many seconds; then it is closed",
    "trickle": "one byte comes, then each further one after so many seconds",
    "flip": "one bit of the body is another one",
    "delay": "the answer begins so many seconds later",
    "hang": "no answer comes for so many seconds; then the connection is closed",
    "pace": "the body comes at so many bytes per second",
    "far": (
        "the answer begins so many seconds later, and its body comes at so many bytes per second, as from"
        " another building"
    ),
    "refuse": "nobody listens for so many seconds",
    **{status: f"the answer is {status} {name}, {code}" for status, (name, code) in STATUS.items()},
}


@dataclass(frozen=True)
class Fault:
    """What happens to the answers of some requests for objects."""

    kind: str
    """One of KINDS."""
    times: int = 1
    """How many requests it happens to; 0: no limit."""
    share: float = 1.0
    """Of the requests that it could happen to."""
    after: int = 0
    """Bytes of the body that come through first; a shorter body comes through whole."""
    seconds: float = 5.0
    rate: float = 1e6
    """Bytes per second of `pace` and `far`."""
    key: str = ""
    """Only requests whose path contains this."""
    skip: int = 0
    """How many such requests are let through first."""

    @classmethod
    def parse(cls, text: str) -> Fault:
        """From words such as `reset,after=1000000,times=6`. Raises ConfigError."""
        kind, *settings = text.split(",")
        types = {one.name: type(getattr(cls, one.name)) for one in fields(cls) if one.name != "kind"}
        try:
            given = dict(setting.split("=", 1) for setting in settings)
            if kind not in KINDS:
                raise ValueError(f"no fault is called {kind!r}")
            return cls(kind, **{name: types[name](value) for name, value in given.items()})
        except (ValueError, KeyError) as error:
            known = "\n".join(f"  {name:8} {what}" for name, what in KINDS.items())
            raise ConfigError(
                f"{text}: {error}. A fault is KIND[,{',NAME='.join(['', *types])[1:]}=...], and a kind is one"
                f" of\n{known}"
            ) from None


@dataclass
class Proxy:
    """A running proxy; `faults` may be changed at any time."""

    target: tuple[str, int]
    faults: list[Fault]
    endpoint: str = ""
    seen: Counter[Fault] = field(default_factory=Counter)
    """How many requests each fault could have happened to."""
    hits: Counter[Fault] = field(default_factory=Counter)
    """How many it has happened to."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of each request."""
    random: random.Random = field(default_factory=lambda: random.Random(1))
    _server: asyncio.Server | None = None
    _connections: set[asyncio.StreamWriter] = field(default_factory=set)

    def set(self, *faults: Fault) -> None:
        """From now on these happen."""
        self.faults = list(faults)
        self.seen.clear()
        self.hits.clear()
        self.requests.clear()

    async def listen(self, port: int = 0) -> int:
        """Take connections; returns the port."""
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", port, limit=1 << 20)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Drop everybody, and listen no more."""
        if self._server:
            self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _choose(self, method: str, path: str) -> Fault | None:
        """The fault of this request, if one is due."""
        if method not in ("GET", "HEAD") or "list-type=" in path or "/" not in path.strip("/"):
            return None
        for fault in self.faults:
            bytes_only = fault.kind not in ("400", "403", "404", "refuse", "far")  # what HEAD shows, too
            if fault.key not in path or (method == "HEAD" and bytes_only):
                continue
            self.seen[fault] += 1
            if (
                self.seen[fault] <= fault.skip
                or (fault.times and self.hits[fault] >= fault.times)
                or self.random.random() >= fault.share
            ):
                continue
            self.hits[fault] += 1
            return fault
        return None

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._request(reader, writer):
                pass
        self._connections.discard(writer)
        writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False if the connection ends with it."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        headers = _headers(head)
        if "expect" in headers:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append((method, path, headers.get("range", "")))
        fault = self._choose(method, path)
        kind = fault.kind if fault else ""
        if fault and kind in STATUS:
            await _answer(writer, kind, head=method == "HEAD")
            return True
        if fault and kind == "refuse":
            await self._refuse(fault.seconds)
            return False
        if fault and kind in ("delay", "hang", "far"):
            await asyncio.sleep(fault.seconds)
            if kind == "hang":
                return False
        return await self._pass_on(head + body, method, writer, fault)

    async def _pass_on(
        self, request: bytes, method: str, writer: asyncio.StreamWriter, fault: Fault | None
    ) -> bool:
        above, below = await asyncio.open_connection(*self.target, limit=1 << 20)
        try:
            below.write(request)
            while (answer := await above.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 "):
                pass  # it was said already
            headers = _headers(answer)
            if headers.get("transfer-encoding") == "chunked":  # lists: as it comes, to its end
                writer.write(answer)
                while not (line := await above.readuntil(b"\r\n")).startswith(b"0\r"):
                    writer.write(line + await above.readexactly(int(line, 16) + 2))
                writer.write(line + await above.readuntil(b"\r\n"))
                await writer.drain()
                return True
            size = 0 if method == "HEAD" else int(headers.get("content-length", 0))
            writer.write(answer)
            return await _body(above, writer, size, fault)
        finally:
            below.close()

    async def _refuse(self, seconds: float) -> None:
        """Stop to listen, drop everybody, and listen again later."""
        assert self._server is not None
        port = int(self._server.sockets[0].getsockname()[1])
        self._server.close()
        for writer in list(self._connections):
            _reset(writer)
        await asyncio.sleep(seconds)
        await self.listen(port)


async def _body(
    above: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int, fault: Fault | None
) -> bool:
    """Pass on a body of so many bytes with what is to happen to it; False if the connection ends with it."""
    kind, after = (fault.kind, fault.after) if fault else ("", 0)
    loop, sent = asyncio.get_running_loop(), 0
    began = loop.time()
    while sent < size:
        chunk = await above.read(min(CHUNK, size - sent))
        if not chunk:
            return False
        if (
            fault
            and kind in ("reset", "close", "stall", "trickle", "flip")
            and sent <= after < sent + len(chunk)
        ):
            cut = after - sent
            if kind == "flip":
                chunk = chunk[:cut] + bytes([chunk[cut] ^ 1]) + chunk[cut + 1 :]
            else:
                writer.write(chunk[:cut])
                await writer.drain()
                if kind == "reset":
                    await asyncio.sleep(0.02)  # so that what was sent arrives: a reset overtakes it
                    _reset(writer)
                elif kind == "stall":
                    await asyncio.sleep(fault.seconds)
                elif kind == "trickle":
                    for byte in chunk[cut:]:
                        writer.write(bytes([byte]))
                        await writer.drain()
                        await asyncio.sleep(fault.seconds)
                return False
        if fault and kind in ("pace", "far"):
            await asyncio.sleep(began + (sent + len(chunk)) / fault.rate - loop.time())
        writer.write(chunk)
        await writer.drain()
        sent += len(chunk)
    await writer.drain()
    return True


async def _answer(writer: asyncio.StreamWriter, status: str, *, head: bool) -> None:
    name, code = STATUS[status]
    body = (
        f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>as told by tools.sandbox'
        " --faults</Message></Error>".encode()
    )
    headers = f"Content-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(f"HTTP/1.1 {status} {name}\r\n{headers}".encode() + (b"" if head else body))
    await writer.drain()


def _headers(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines if ":" in line)
    }


def _reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextmanager
def serve(endpoint: str, faults: Sequence[Fault] = ()) -> Iterator[Proxy]:
    """Run a proxy before an endpoint, in a thread of its own."""
    place = urlsplit(endpoint)
    proxy = Proxy((str(place.hostname), int(place.port or 80)), list(faults))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="faults", daemon=True)
    thread.start()
    port = asyncio.run_coroutine_threadsafe(proxy.listen(), loop).result()
    proxy.endpoint = f"http://127.0.0.1:{port}"
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(proxy.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
