"""What a server has answered, whichever library has asked it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

from aiohttp import ClientResponseError
from aiohttp.http_exceptions import HttpProcessingError
from botocore.exceptions import ClientError

SHOWN = 300
"""Characters of a server's message that are shown."""
MOST_ASKEW = 600.0
"""Seconds between two clocks from which on they are told of; S3 takes 900."""


@dataclass(frozen=True)
class Answer:
    """A refusal, as far as its server says what it is."""

    status: int = 0
    """Its HTTP status; 0 if there was no answer at all."""
    code: str = ""
    """The server's word for it, as NoSuchKey; empty if it said none, as S3 in the answer to a HEAD."""
    message: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    """What else S3 says, as Region, Endpoint, StorageClass."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """By names in lower case."""

    def __str__(self) -> str:
        """Status and code, as `403 AccessDenied`."""
        return " ".join(filter(None, [str(self.status), self.code]))

    def region(self) -> str:
        """The region that a bucket is in, if the server says so."""
        expected = re.search(r"expecting '([\w-]+)'", self.message)
        return (
            self.headers.get("x-amz-bucket-region")
            or self.fields.get("Region")
            or (expected[1] if expected else "")
        )

    def clock_difference(self) -> float:
        """Seconds that the server's clock is ahead of this machine's; 0 if it does not say, or if that is
        little."""
        try:
            ahead = parsedate_to_datetime(self.headers["date"]).timestamp() - time.time()
        except (KeyError, ValueError):
            return 0.0
        return ahead if abs(ahead) > MOST_ASKEW else 0.0


def answer_of(error: BaseException) -> Answer:
    """What a server has said that led to an error; file systems wrap that of the library they ask with."""
    cause = error if isinstance(error, (ClientError, ClientResponseError)) else error.__cause__
    if isinstance(cause, ClientError):
        said = {name: str(value) for name, value in cause.response.get("Error", {}).items()}
        code, message = said.pop("Code", ""), said.pop("Message", "")
        about = cause.response.get("ResponseMetadata", {})
        status, headers = int(about.get("HTTPStatusCode", 0)), about.get("HTTPHeaders", {})
        if code.isdigit():  # the status once more: there was no body
            code, message = "", ""
        return Answer(status, code, _short(message), said, _lower(headers))
    if isinstance(cause, ClientResponseError):
        if isinstance(cause.__cause__, HttpProcessingError):  # what came was no answer in HTTP
            return Answer()
        return Answer(cause.status, headers=_lower(cause.headers or {}))
    # As the errors of huggingface_hub have it, which its file system wraps in part.
    hub = error if hasattr(error, "response") else error.__cause__
    response = getattr(hub, "response", None)
    if response is None:
        return Answer()
    headers = _lower(response.headers)
    message = _short(str(getattr(hub, "server_message", None) or ""))
    return Answer(int(response.status_code), headers.get("x-error-code", ""), message, {}, headers)


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _short(message: str) -> str:
    """A message in one line, without the full stop at its end."""
    line = " ".join(message.split()).rstrip(".")
    return line if len(line) <= SHOWN else f"{line[:SHOWN]} ..."
