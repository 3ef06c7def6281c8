"""What a failure of a file system means. Imported when one has failed: the libraries that know their errors
take long to import."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

from aiohttp import ClientError as HttpError
from aiohttp import TooManyRedirects
from botocore import exceptions as boto
from botocore.exceptions import (
    AwsChunkedWrapperError,
    BotoCoreError,
    ChecksumError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from configs.disk import words_of_disk
from data.answers import Answer, answer_of
from data.location import Location
from data.retry import advice

HubError: type[Exception] = HfHubHTTPError.__bases__[0]
"""The HTTPError of httpx or httpx2, whichever this huggingface_hub has."""
FAILURES: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    BotoCoreError,
    ClientError,
    HttpError,
    HubError,
    RecursionError,
    ResponseParserError,
    ValueError,
    TypeError,
)
"""Failures of file systems; whether one passes, `judge` says."""
NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound)
PASSING_ERRORS = (
    AwsChunkedWrapperError,
    BotoConnectionError,
    ChecksumError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    SSOError,
    TokenRetrievalError,
    getattr(boto, "LoginError", SSOError),  # only newer ones have it
)
"""What passes of botocore's errors: those of the network, and of keys that others hand out. All else is of
settings."""
FINAL_ERRORS = (OfflineModeIsEnabled, ValueError, TypeError)
"""ValueError and TypeError: of an endpoint, or an option, that is none."""
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
"""These pass when whoever changes the keys has done so."""
REFUSED = {"InvalidToken", "AuthorizationHeaderMalformed"}
"""Denied, although the status is 400."""
UNKNOWN_KEYS = {"InvalidAccessKeyId", "InvalidToken", "InvalidSecurity"}
BUSY_STATUS = {408, 409, 423, 425, 429}
"""Beside those from 500 on, what passes."""
FINAL_STATUS = {501, 505, 506, 508, 510, 511}
"""What does not pass of those from 500 on."""
BUSY = re.compile(
    r"throttl|timeout|slow ?down|busy|too ?many ?requests|limit ?exceeded|Internal(Error|Failure|.*Exception)"
    r"|(Service|Key|Temporarily)Unavailable|IncompleteBody|OperationAborted|BadDigest|SHA256Mismatch"
    r"|PriorRequestNotComplete",
    re.IGNORECASE,
)
"""S3's words for what passes, whatever the status is."""
NO_OPTION = re.compile(r"unexpected keyword argument '(\w+)'")
"""What Python says where the libraries below are handed an option that they do not know."""
MOVED = {"PermanentRedirect", "TemporaryRedirect", "Redirect", "IllegalLocationConstraintException"}
WRONG_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG")
"""What OpenSSL says where the other side does not speak TLS."""


@dataclass(frozen=True)
class Verdict:
    """What a failure means."""

    reason: str = ""
    """Why trying again would not help; empty if it may."""
    advice: str = ""
    """What to do about it, in whole sentences."""
    credentials: bool = False
    """Whether other credentials might help."""


def judge(error: Exception, location: Location) -> Verdict:
    """What one of FAILURES means, at a location."""
    answer, general = answer_of(error), advice(location)
    if answer.status and not isinstance(error, TooManyRedirects):
        verdict = _judge_answer(answer, location)
        if verdict.reason and (seconds := answer.clock_difference()):
            return Verdict(f"{verdict.reason}; {_askew(seconds)}", verdict.advice, verdict.credentials)
        return verdict
    if tls := next(_tls_errors(error), None):
        return _judge_tls(tls, location)
    if isinstance(error, RecursionError):  # botocore asks for the region, is redirected, asks for the region
        return _judge_region(Answer())
    if isinstance(error, PermissionError) and location.is_local:
        return Verdict(f"access denied ({words_of_disk(error)})")
    if isinstance(error, PermissionError):
        return Verdict(f"access denied ({error})", general, credentials=True)
    if isinstance(error, FileNotFoundError):
        return Verdict("it does not exist", general)
    if isinstance(error, IsADirectoryError):
        return Verdict("it is a folder", f"`{location.url}/*.tar` names the shards in it.")
    if isinstance(error, NO_CREDENTIALS):
        return Verdict(_line(error), f"{general} {ANON}", credentials=True)
    if type(error).__name__ == "TooManyRedirects":  # of aiohttp and of httpx
        return Verdict("the server redirects without end, as for a sign-in", general)
    if option := NO_OPTION.search(str(error)):
        return Verdict(f"storage_options: there is no option {option[1]!r}", _options(location))
    of_settings = isinstance(error, BotoCoreError) and not isinstance(error, PASSING_ERRORS)
    if of_settings or isinstance(error, FINAL_ERRORS):
        return Verdict(_line(error), general)
    return Verdict()


def _options(location: Location) -> str:
    """Which options people mean."""
    if location.is_s3:
        return (
            "Those of S3: endpoint_url, profile, anon, requester_pays, client_kwargs: {region_name: ...},"
            " config_kwargs: {s3: {addressing_style: path}}."
        )
    return f"fsspec's file system for {location.protocol}:// names its own."


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _judge_answer(answer: Answer, location: Location) -> Verdict:
    status, code, general = answer.status, answer.code, advice(location)
    if status == 412:
        return Verdict(
            "it was replaced since it was indexed (its ETag is another one): index it again with `python -m"
            " tools.index`, or start `tools.stage` again",
            general,
        )
    if status == 416:
        return Verdict(
            "it is shorter than it was when it was indexed: index it again with `python -m tools.index`",
            general,
        )
    if status in (404, 410):
        more = "" if code in ("", "NoSuchKey", "EntryNotFound") else f" ({code})"
        return Verdict(f"it does not exist{more}", general)
    if code in EXPIRED or (status == 400 and not code and location.is_s3):
        return Verdict(credentials=True)
    if BUSY.search(code) or status in BUSY_STATUS or (status >= 500 and status not in FINAL_STATUS):
        return Verdict()
    if location.is_s3 and (verdict := _judge_s3(answer, location)):
        return verdict
    said = f"{answer}: {answer.message}" if answer.message else str(answer)
    if status in (401, 403):
        return Verdict(f"access denied ({said})", DENIED.get(location.protocol, general), credentials=True)
    if status == 407:
        return Verdict("the proxy wants a password (407)", "Ask whoever runs the proxy for a way through it.")
    if status in (405, 501):
        return Verdict(
            f"this server does not know how to do that ({said})",
            f"{general} If they are right, copy the shards to a disk by the server's own tools.",
        )
    if 300 <= status < 400:
        where = answer.headers.get("location") or "nowhere"
        if region := answer.region():  # S3, asked by a plain URL
            where += f", as for what is in another region, {region}"
        return Verdict(f"the server redirects to {where} ({said})", general)
    return Verdict(f"it was refused ({said})", general)


ANON = "A public bucket is read without keys: `storage_options: {anon: true}`."
PAYER = "Where a bucket's readers pay for it: `storage_options: {requester_pays: true}`."
UNLISTED = "Where a bucket may not be listed, what does not exist counts as denied, too."
NETRC = (
    "Check the URL. A user and a password are taken from ~/.netrc, with"
    " `storage_options: {client_kwargs: {trust_env: true}}`; what wants a token is copied to a disk by hand,"
    " as with `curl -H`: configs hold no secrets."
)
DENIED = {"http": NETRC, "https": NETRC}


def _judge_s3(answer: Answer, location: Location) -> Verdict | None:
    """What S3 refuses in words of its own."""
    code, message, general = answer.code, answer.message, advice(location)
    if code == "RequestTimeTooSkewed":
        return _judge_clock(answer)
    wrong_region = code == "AuthorizationHeaderMalformed" and answer.region()
    if 300 <= answer.status < 400 or code in MOVED or wrong_region:
        return _judge_region(answer)
    if code == "InvalidObjectState":
        kind = answer.fields.get("StorageClass") or answer.fields.get("AccessTier") or "its storage class"
        return Verdict(f"it is archived ({kind}) and must be restored first", _restoring(location, answer))
    if code.startswith("KMS.") or re.search(r"kms:\w|\bKMS\b", message):
        return Verdict(
            f"it is encrypted, and its key in KMS may not be used ({answer}: {message})",
            "Whoever owns the key must enable it, and allow kms:Decrypt to these credentials.",
            credentials=answer.status == 403,
        )
    if re.search(
        r"customer[- ]?(provided|key)|server[- ]side encryption|sse-?c\b", f"{code} {message}", re.I
    ):
        return Verdict(
            f"it is encrypted with a key of its owner's own, SSE-C ({answer})",
            "Copy it to a disk with `aws s3 cp --sse-c AES256 --sse-c-key fileb://KEY`, and train on the"
            " copy: configs hold no keys.",
        )
    if answer.status in (401, 403) or code in REFUSED:
        plain = message.lower() in ("", "access denied", "forbidden")
        reason = f"access denied ({answer})" + ("" if plain else f", {message}")
        if code in UNKNOWN_KEYS:
            return Verdict(reason, f"{general} {ANON}", credentials=True)
        if json.loads(location.options).get("anon"):
            return Verdict(reason, "With `anon: true` only what is public can be read: leave that out.")
        more = f"{ANON} {PAYER} {UNLISTED}" if code in ("", "AccessDenied") else ""
        return Verdict(reason, f"{general} {more}".strip(), credentials=True)
    return None


def _judge_region(answer: Answer) -> Verdict:
    region = answer.region()
    endpoint = answer.fields.get("Endpoint") or re.sub(
        r"^https?://|/.*", "", answer.headers.get("location", "")
    )
    where = ", ".join(filter(None, [region, endpoint])) or "and the server does not say in which"
    name = region or "REGION"
    return Verdict(
        f"its bucket is in another region, {where}" + (f" ({answer})" if answer.status else ""),
        f"Set `storage_options: {{client_kwargs: {{region_name: {name}}}}}`, or AWS_DEFAULT_REGION={name}."
        " Name no endpoint of another region (`endpoint_url`, AWS_ENDPOINT_URL).",
    )


def _judge_clock(answer: Answer) -> Verdict:
    server = answer.fields.get("ServerTime")
    return Verdict(
        "this machine's clock and the server's are too far apart"
        + (f", the server's says {server}" if server else "")
        + f" ({answer})",
        "Set this machine's clock (`timedatectl` shows it, and whether it is synchronised).",
    )


def _askew(seconds: float) -> str:
    way = "behind" if seconds > 0 else "ahead of"
    return f"this machine's clock is {abs(seconds) / 60:,.0f} minutes {way} the server's: set it right"


def _restoring(location: Location, answer: Answer) -> str:
    bucket, _, key = location.url.partition("://")[2].partition("/")
    # What is in Intelligent-Tiering comes back for good, all else for some days.
    request = "{}" if "AccessTier" in answer.fields else "Days=30"
    return (
        f"Restore it: `aws s3api restore-object --bucket {bucket} --key {key} --restore-request"
        f" '{request}'`. That takes hours; then start again."
    )


def _tls_errors(error: BaseException | None) -> Iterator[ssl.SSLError]:
    """Errors of TLS that do not pass, in what led to an error."""
    seen: set[int] = set()  # an error that is raised anew is in what led to itself
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for said in (error, *error.args):
            if isinstance(said, ssl.SSLCertVerificationError) or (
                isinstance(said, ssl.SSLError) and getattr(said, "reason", "") in WRONG_TLS
            ):
                yield said
        error = error.__cause__ or error.__context__


def _judge_tls(error: ssl.SSLError, location: Location) -> Verdict:
    if not isinstance(error, ssl.SSLCertVerificationError):
        return Verdict(
            f"the server does not speak TLS ({error.reason})", "Is it http:// instead of https://?"
        )
    variable = "AWS_CA_BUNDLE" if location.is_s3 else "SSL_CERT_FILE"
    said = getattr(error, "verify_message", "") or str(error)
    return Verdict(
        f"the server's certificate is not valid here ({said})",
        "Check the host's name and this machine's clock. The file of an authority of your own is named by"
        f" {variable}=FILE.",
    )
