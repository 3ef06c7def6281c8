"""Folders, here or on S3, that a tool writes: complete, or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsspec.core import split_protocol

from configs.errors import ConfigError, EarwitnessError
from configs.schema import public
from data.location import Location, open_filesystem
from data.retry import Trouble
from data.upload import upload

ABANDONED = timedelta(days=1)
"""After so long an upload to the same place counts as left by a run that was killed."""


@dataclass(frozen=True)
class Output:
    """A temporary folder to write into, and what is to be called with a file of it that is complete, where
    that may leave before the others."""

    folder: Path
    complete: Callable[[Path], None]


@contextmanager
def new_folder(out: str, last: str = "") -> Iterator[Output]:
    """A folder, or a prefix on S3, that is there when the block ends well, and leaves nothing when it does
    not.

    A temporary folder beside `out` takes its name; to S3 files are copied from $TMPDIR when they are
    complete, the one called `last` after all others. Raises ConfigError if `out` holds something already or
    cannot be made, DataError if the bucket is missing or access is denied.
    """
    try:
        public(out)
    except ValueError as error:
        raise ConfigError(f"OUT: {error}") from None
    protocol, path = split_protocol(out)
    if protocol in (None, "file", "local"):
        with _folder(Path(path)) as folder:
            yield Output(folder, lambda file: None)
    elif protocol in ("s3", "s3a"):
        if not path.strip("/"):
            raise ConfigError(f"{out}: names no bucket; it is written s3://BUCKET/PREFIX")
        with TemporaryDirectory(prefix="earwitness-") as temporary, _prefix(out.rstrip("/")) as put:
            folder = Path(temporary)
            yield Output(folder, put)
            for file in sorted(folder.iterdir(), key=lambda file: (file.name == last, file.name)):
                put(file)
    else:
        raise ConfigError(f"{out}: is written to a folder or to s3://BUCKET/PREFIX, not to {protocol}:")


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; remove it or choose another folder")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be made: {error.strerror}") from error
    try:
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _prefix(url: str) -> Iterator[Callable[[Path], None]]:
    """What moves a file below an empty prefix on S3; all such objects are removed again when the block does
    not end well."""
    filesystem, path = open_filesystem(Location(url))
    bucket, prefix, _ = filesystem.split_path(path)
    prefix = f"{prefix}/" if prefix else ""

    def call(what: str, method: str, **arguments: Any) -> Any:
        return Trouble(Location(url), what).retry(
            lambda filesystem, _: filesystem.call_s3(method, Bucket=bucket, **arguments)
        )

    def abort(wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Abort multipart uploads: nobody sees them, but they are paid for."""
        for begun in filter(
            wanted, call("list uploads", "list_multipart_uploads", Prefix=prefix).get("Uploads", [])
        ):
            call("abort an upload", "abort_multipart_upload", Key=begun["Key"], UploadId=begun["UploadId"])

    there = call("read what is there", "list_objects_v2", Prefix=prefix, MaxKeys=3)
    if names := [found["Key"].removeprefix(prefix) for found in there.get("Contents", [])]:
        raise ConfigError(
            f"{url}: exists and is not empty ({', '.join(names)}, ...); choose another place, or remove it,"
            f" perhaps of a run that was killed: aws s3 rm --recursive {url}/"
        )
    probe = call("write there", "create_multipart_upload", Key=f"{prefix}probe")[
        "UploadId"
    ]  # before the work of hours: may this be written?
    abort(lambda begun: begun["UploadId"] == probe or datetime.now(UTC) - begun["Initiated"] > ABANDONED)
    moved: list[str] = []

    def put(file: Path) -> None:
        moved.append(file.name)
        upload(file, Location(f"{url}/{file.name}"))
        file.unlink()

    try:
        yield put
    except BaseException:
        with suppress(EarwitnessError):
            written = [f"{url}/{name}" for name in moved]
            Trouble(Location(url), "remove what was written").retry(
                lambda filesystem, _: filesystem.rm(written) if written else None
            )
        with suppress(EarwitnessError):
            abort(lambda begun: begun["Key"].removeprefix(prefix) in moved)
        raise
