"""A proxy before an S3 server that breaks its answers as told, in the ways of networks and busy servers."""

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
from typing import Any
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
KINDS_FOR_HEAD = ("400", "403", "404", "refuse", "far")
"""Kinds that happen to HEAD requests, too."""
RESET_SECONDS = 0.02
"""Pause before a reset, so that what was sent arrives: a reset overtakes it."""


@dataclass(frozen=True)
class Fault:
    """What happens to the answers of some requests for objects."""

    kind: str
    """One of KINDS."""
    times: int = 1
    """How many requests it happens to; 0: no limit."""
    share: float = 1.0
    """Share of the requests that it happens to, of those that it could happen to; chosen at random."""
    after: int = 0
    """Bytes of the body that come through first; a shorter body comes through whole."""
    seconds: float = 5.0
    """How long it lasts, where a kind has a length."""
    rate: float = 1e6
    """Bytes per second of `pace` and `far`."""
    key: str = ""
    """Only requests whose path contains this."""
    skip: int = 0
    """How many such requests are let through first."""

    @classmethod
    def parse(cls, text: str) -> Fault:
        """A fault from words such as `reset,after=1000000,times=6`. Raises ConfigError."""
        kind, *settings = text.split(",")
        types = {
            option.name: type(getattr(cls, option.name)) for option in fields(cls) if option.name != "kind"
        }
        try:
            if kind not in KINDS:
                raise ValueError(f"no fault is called {kind!r}")
            values: dict[str, Any] = {}
            for setting in settings:
                name, value = setting.split("=", 1)
                values[name] = types[name](value)
            return cls(kind, **values)
        except (ValueError, KeyError) as error:
            form = "".join(f"[,{name}=...]" for name in types)
            kinds = "\n".join(f"  {name:8} {meaning}" for name, meaning in KINDS.items())
            raise ConfigError(
                f"{text}: {error}. A fault is KIND{form}, and a kind is one of\n{kinds}"
            ) from None


@dataclass
class Proxy:
    """A running proxy. `set` changes its faults at any time."""

    target: tuple[str, int]
    faults: list[Fault]
    endpoint: str = ""
    seen: Counter[Fault] = field(default_factory=Counter)
    """How many requests each fault could have happened to."""
    hits: Counter[Fault] = field(default_factory=Counter)
    """How many requests each fault has happened to."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of each request."""
    random: random.Random = field(default_factory=lambda: random.Random(1))
    _server: asyncio.Server | None = None
    _connections: set[asyncio.StreamWriter] = field(default_factory=set)

    def set(self, *faults: Fault) -> None:
        """Let these faults happen from now on, and count anew."""
        self.faults = list(faults)
        self.seen.clear()
        self.hits.clear()
        self.requests.clear()

    async def listen(self, port: int = 0) -> int:
        """Take connections; returns the port, which the kernel chooses if it is 0."""
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", port, limit=1 << 20)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Drop all connections, and listen no more."""
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
            if fault.key not in path or (method == "HEAD" and fault.kind not in KINDS_FOR_HEAD):
                continue
            self.seen[fault] += 1
            if self.seen[fault] <= fault.skip:
                continue
            if fault.times and self.hits[fault] >= fault.times:
                continue
            if self.random.random() >= fault.share:
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
        """Ask the server, and pass its answer on; False if the connection ends with it."""
        above, below = await asyncio.open_connection(*self.target, limit=1 << 20)
        try:
            below.write(request)
            while (answer := await above.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 "):
                pass  # the client has had that answer from this proxy
            headers = _headers(answer)
            writer.write(answer)
            if headers.get("transfer-encoding") == "chunked":
                await _chunks(above, writer)
                return True
            size = 0 if method == "HEAD" else int(headers.get("content-length", 0))
            return await _body(above, writer, size, fault)
        finally:
            below.close()

    async def _refuse(self, seconds: float) -> None:
        """Stop listening, drop all connections, and listen again later."""
        assert self._server is not None
        port = int(self._server.sockets[0].getsockname()[1])
        self._server.close()
        for writer in list(self._connections):
            _reset(writer)
        await asyncio.sleep(seconds)
        await self.listen(port)


async def _chunks(above: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on a chunked body (lists have it) as it comes, to its end."""
    while not (size := await above.readuntil(b"\r\n")).startswith(b"0\r"):
        writer.write(size + await above.readexactly(int(size, 16) + 2))
    writer.write(size + await above.readuntil(b"\r\n"))
    await writer.drain()


async def _body(
    above: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int, fault: Fault | None
) -> bool:
    """Pass on a body of `size` bytes with what is to happen to it; False if the connection ends with it."""
    loop = asyncio.get_running_loop()
    began, sent = loop.time(), 0
    while sent < size:
        chunk = await above.read(min(CHUNK, size - sent))
        if not chunk:
            return False
        if fault is not None and sent <= fault.after < sent + len(chunk):
            place = fault.after - sent
            if fault.kind in ("reset", "close", "stall", "trickle"):
                await _break_off(writer, chunk, place, fault)
                return False
            if fault.kind == "flip":
                chunk = chunk[:place] + bytes([chunk[place] ^ 1]) + chunk[place + 1 :]
        if fault is not None and fault.kind in ("pace", "far"):
            await asyncio.sleep(began + (sent + len(chunk)) / fault.rate - loop.time())
        writer.write(chunk)
        await writer.drain()
        sent += len(chunk)
    await writer.drain()
    return True


async def _break_off(writer: asyncio.StreamWriter, chunk: bytes, place: int, fault: Fault) -> None:
    """Send a chunk up to `place`, and let the fault happen there; the caller closes the connection."""
    writer.write(chunk[:place])
    await writer.drain()
    if fault.kind == "reset":
        await asyncio.sleep(RESET_SECONDS)
        _reset(writer)
    elif fault.kind == "stall":
        await asyncio.sleep(fault.seconds)
    elif fault.kind == "trickle":
        for byte in chunk[place:]:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(fault.seconds)


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
    """The headers of a request or an answer, their names in lower case."""
    headers = {}
    for line in head.decode("latin-1").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return headers


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with RST instead of FIN: SO_LINGER on, for 0 s."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextmanager
def serve(endpoint: str, faults: Sequence[Fault] = ()) -> Iterator[Proxy]:
    """Run a proxy before an endpoint, in a thread of its own."""
    url = urlsplit(endpoint)
    proxy = Proxy((str(url.hostname), int(url.port or 80)), list(faults))
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
