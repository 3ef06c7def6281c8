"""What a failure of a file system means. Imported when one has failed: the libraries that know their errors
take long to import."""

from __future__ import annotations

from dataclasses import dataclass

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
from huggingface_hub.errors import HfHubHTTPError

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
"""Failures of file systems; whether one passes, `judge` says."""
NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound)
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
"""These pass when whoever changes the keys has done so."""
REFUSED = {"InvalidToken", "AuthorizationHeaderMalformed"}
"""Denied, although the status is 400."""


@dataclass(frozen=True)
class Verdict:
    """What a failure means."""

    reason: str = ""
    """Why trying again would not help; empty if it may."""
    credentials: bool = False
    """Whether other credentials might help."""


def judge(error: Exception) -> Verdict:
    """What one of FAILURES means."""
    status, code = _status(error), _code(error)
    if status == 412:
        return Verdict(
            "it was replaced since it was indexed (its ETag is another one): index it again with `python -m"
            " tools.index`, or start `tools.stage` again"
        )
    if status == 416:
        return Verdict(
            "it is shorter than it was when it was indexed: index it again with `python -m tools.index`"
        )
    # A HEAD's answer has no body that would say more than 400.
    if code in EXPIRED or code == "400":
        return Verdict(credentials=True)
    if status in (401, 403) or code in REFUSED or isinstance(error, PermissionError):
        said = [str(status)] if status else []
        if code not in ("", *said):
            said.append(code)
        return Verdict(f"access denied ({' '.join(said) or error})", credentials=True)
    if status == 404 or isinstance(error, FileNotFoundError):
        more = "" if code in ("", "404", "NoSuchKey") else f" ({code})"
        return Verdict(f"it does not exist{more}")
    if isinstance(error, NO_CREDENTIALS):
        return Verdict(str(error), credentials=True)
    # ValueError and TypeError: of an endpoint, or an option, that is none.
    if isinstance(error, (IsADirectoryError, ParamValidationError, ValueError, TypeError)):
        return Verdict(" ".join(str(error).split()))
    return Verdict()


def _status(error: Exception) -> int:
    """The status of a server's answer; 0 if there was none."""
    cause = _cause(error)
    if isinstance(cause, ClientError):
        return int(cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if isinstance(cause, ClientResponseError):
        return cause.status
    return int(getattr(getattr(error, "response", None), "status_code", 0))  # as HubError has it


def _code(error: Exception) -> str:
    """S3's word for an error, as NoSuchKey; empty if there is none."""
    cause = _cause(error)
    return str(cause.response.get("Error", {}).get("Code", "")) if isinstance(cause, ClientError) else ""


def _cause(error: Exception) -> BaseException | None:
    """What a server said, which file systems wrap."""
    return error if isinstance(error, (ClientError, ClientResponseError)) else error.__cause__
