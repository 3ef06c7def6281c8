"""A server that refuses in the ways of S3 and of web servers: http://127.0.0.1:PORT/NAME/a.tar is refused as
REFUSALS[NAME] says."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

PAGE = b"<!DOCTYPE html><title>Sign in</title><br>" + b" " * 5000


@dataclass(frozen=True)
class Refusal:
    """An answer. Without `code` it has no body."""

    status: int
    code: str = ""
    message: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    clock: float = 0.0
    """Seconds that its Date is ahead."""
    head: bool = True
    """Whether a HEAD is refused, too."""

    def body(self) -> bytes:
        said = {"Code": self.code, "Message": self.message, **self.fields}
        inner = "".join(f"<{name}>{value}</{name}>" for name, value in said.items())
        return f"<?xml version='1.0'?><Error>{inner}</Error>".encode() if self.code else b""


ENCRYPTED = (
    "The object was stored using a form of Server Side Encryption. The correct parameters must be provided to"
    " retrieve the object."
)
REFUSALS = {
    "moved": Refusal(
        301,
        "PermanentRedirect",
        fields={"Endpoint": "moved.s3.eu-west-9.example.com"},
        headers={"x-amz-bucket-region": "eu-west-9"},
    ),
    "elsewhere": Refusal(307, "TemporaryRedirect", fields={"Endpoint": "elsewhere.s3.example.com"}),
    "bare": Refusal(301, headers={"x-amz-bucket-region": "eu-west-9"}),
    "malformed": Refusal(400, "AuthorizationHeaderMalformed", "expecting", {"Region": "ap-south-9"}),
    "expecting": Refusal(400, "AuthorizationHeaderMalformed", "the region is wrong; expecting 'eu-west-9'"),
    "opted": Refusal(
        400,
        "IllegalLocationConstraintException",
        "The me-south-9 location constraint",
        headers={"x-amz-bucket-region": "me-south-9"},
    ),
    "archived": Refusal(403, "InvalidObjectState", "", {"StorageClass": "GLACIER"}, head=False),
    "tiered": Refusal(403, "InvalidObjectState", "", {"AccessTier": "ARCHIVE_ACCESS"}, head=False),
    "denied": Refusal(403, "AccessDenied", "Access Denied"),
    "public": Refusal(403, "InvalidAccessKeyId", "The key does not exist in our records."),
    "unsigned": Refusal(403, "SignatureDoesNotMatch", "The signature does not match."),
    "skewed": Refusal(403, "RequestTimeTooSkewed", "", {"ServerTime": "2026-01-01T00:00:00Z"}),
    "late": Refusal(403, "AccessDenied", "Access Denied", clock=3600),
    "customer": Refusal(400, "InvalidRequest", ENCRYPTED),
    "kms": Refusal(400, "KMS.DisabledException", "arn:aws:kms:key is disabled."),
    "decrypt": Refusal(403, "AccessDenied", "User x is not authorized to perform: kms:Decrypt on y"),
    "argument": Refusal(400, "InvalidArgument", "That is no argument."),
    "unimplemented": Refusal(501, "NotImplemented", "A header is not implemented."),
    "method": Refusal(405, "MethodNotAllowed", "The method is not allowed."),
    "legal": Refusal(451, "UnavailableForLegalReasons", "No."),
    "busy": Refusal(400, "RequestTimeout", "Your socket was not read in time."),
    "throttled": Refusal(400, "KMS.ThrottlingException", "You have exceeded the rate."),
    "unauthorised": Refusal(401),
    "forbidden": Refusal(403),
    "gone": Refusal(410),
    "bad": Refusal(400),
    "loop": Refusal(302, headers={"location": "/loop/a.tar"}),
    "many": Refusal(429),
    "gated": Refusal(403, headers={"X-Error-Code": "GatedRepo", "X-Error-Message": "Accept the terms"}),
    "private": Refusal(401, headers={"X-Error-Code": "RepoNotFound"}),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    content = b""

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")  # type: ignore[attr-defined]
        names = urlsplit(self.path).path.strip("/").split("/")
        # The hub's paths are /api/datasets/OWNER/NAME/...
        name = names[3] if names[0] == "api" else names[0]
        refusal = REFUSALS.get(name)
        if refusal and (refusal.head or self.command != "HEAD"):
            return self.answer(refusal.status, refusal.body(), refusal.headers, refusal.clock)
        signed, pays = "Authorization" in self.headers, "x-amz-request-payer" in self.headers
        if (name == "payer" and not pays) or (name == "anonymous" and signed):
            return self.answer(403, REFUSALS["denied"].body())
        if "list-type" in self.path:
            return self.answer(200, self.listed(name))
        if not self.path.endswith("a.tar"):
            return self.answer(404, b"")
        if name == "page":
            return self.answer(200, PAGE, {"Content-Type": "text/html"})
        if name == "netrc" and self.headers.get("Authorization") != "Basic bWU6aHVudGVyMg==":
            return self.answer(401, b"")
        if name == "endless":
            return self.chunked({"Content-Type": "application/x-tar"})
        wanted = self.headers.get("Range")
        if wanted and name != "whole":
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            part = self.content[int(start) : int(end) + 1]
            placed = f"bytes {start}-{int(start) + len(part) - 1}/{len(self.content)}"
            return self.answer(206, part, {"Content-Range": placed, "ETag": '"one"'})
        return self.answer(200, self.content, {"ETag": '"one"'})

    do_HEAD = do_GET

    def listed(self, bucket: str) -> bytes:
        return (
            f"<?xml version='1.0'?><ListBucketResult><Name>{bucket}</Name><IsTruncated>false</IsTruncated>"
            f"<KeyCount>1</KeyCount><Contents><Key>a.tar</Key><ETag>&quot;one&quot;</ETag>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>{len(self.content)}</Size></Contents>"
            "</ListBucketResult>"
        ).encode()

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}, clock: float = 0.0) -> None:
        self.send_response_only(status)
        self.send_header("Date", formatdate(time.time() + clock, usegmt=True))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def chunked(self, headers: Mapping[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Transfer-Encoding": "chunked"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(self.content), self.content))

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Knows what was asked for."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), type("Serving", (Handler,), {"content": content}))
        self.content, self.requests = content, list[str]()

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may hang up
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve(content: bytes) -> Iterator[Server]:
    """Serve an object, or refuse it."""
    with Server(content) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
