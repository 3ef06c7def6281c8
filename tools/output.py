"""Folders, here or on S3, that a tool writes: complete, or not there."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsspec.core import split_protocol

from configs.disk import naming, words_of_disk
from configs.errors import ConfigError, EarwitnessError
from configs.schema import public
from data.location import Location, open_filesystem
from data.retry import Trouble
from data.upload import upload

ABANDONED = timedelta(days=1)
"""An upload to the same place that is older was left by a run that was killed."""

COMPLETED_LATE = 2.0
"""Seconds after which an upload that was broken off has appeared all the same, if the server had it all."""


@dataclass(frozen=True)
class Output:
    """A temporary folder to write into."""

    folder: Path
    complete: Callable[[Path], None]
    """To be called with a file that is complete, if it may leave the folder before the others."""


@contextmanager
def new_folder(out: str, last: str = "") -> Iterator[Output]:
    """A folder, or a prefix on S3, that is there when the block ends well; otherwise nothing is left of it.

    A temporary folder beside `out` is renamed to it. To S3, files are copied from $TMPDIR when they are
    complete; the one called `last` goes after all others. Raises ConfigError if `out` holds something already
    or cannot be made, DataError if the bucket is missing or access is denied.
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
            with naming(folder):
                yield Output(folder, put)
            for file in sorted(folder.iterdir(), key=lambda file: (file.name == last, file.name)):
                put(file)
    else:
        raise ConfigError(f"{out}: is written to a folder or to s3://BUCKET/PREFIX, not to {protocol}:")


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty_folder:
        raise ConfigError(f"{out}: exists and is not empty; remove it or choose another folder")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be made: {words_of_disk(error)}") from error
    try:
        with naming(out):
            yield temporary
            if out.exists():
                out.rmdir()
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _prefix(url: str) -> Iterator[Callable[[Path], None]]:
    """A function that moves a file below an empty prefix on S3; what it has moved is removed again when the
    block does not end well."""
    prefix = _Prefix(url)
    prefix.check_empty()
    prefix.check_writable()
    try:
        yield prefix.put
    except BaseException:
        prefix.clear()
        raise


class _Prefix:
    """A prefix on S3, and the files that were moved there."""

    def __init__(self, url: str) -> None:
        self.url = url
        filesystem, path = open_filesystem(Location(url))
        self._bucket, prefix, _ = filesystem.split_path(path)
        self._prefix = f"{prefix}/" if prefix else ""
        self._moved: list[str] = []
        self._is_moving = False

    def check_empty(self) -> None:
        """Raises ConfigError if the prefix holds anything."""
        listed = self._call("read what is there", "list_objects_v2", Prefix=self._prefix, MaxKeys=3)
        names = [self._name(item) for item in listed.get("Contents", [])]
        if names:
            raise ConfigError(
                f"{self.url}: exists and is not empty ({', '.join(names)}, ...); choose another place, or"
                f" remove it, perhaps of a run that was killed: aws s3 rm --recursive {self.url}/"
            )

    def check_writable(self) -> None:
        """Raises DataError if nothing may be written: before the work of hours, an upload is begun and
        aborted. Uploads that a killed run has left are aborted, too."""
        probe = self._call("write there", "create_multipart_upload", Key=f"{self._prefix}probe")
        oldest = datetime.now(UTC) - ABANDONED
        self._abort(lambda item: item["UploadId"] == probe["UploadId"] or item["Initiated"] < oldest)

    def put(self, file: Path) -> None:
        """Upload a file and remove it here."""
        self._moved.append(file.name)
        self._is_moving = True
        upload(file, Location(f"{self.url}/{file.name}"))
        self._is_moving = False
        file.unlink()

    def clear(self) -> None:
        """Remove what was moved, as far as that is possible."""
        urls = [f"{self.url}/{name}" for name in self._moved]
        if not urls:
            return
        for pause in (0.0, COMPLETED_LATE) if self._is_moving else (0.0,):
            time.sleep(pause)
            with suppress(EarwitnessError):
                Trouble(Location(self.url), "remove what was written").retry(
                    lambda filesystem, _: filesystem.rm(urls)
                )
        with suppress(EarwitnessError):
            self._abort(lambda item: self._name(item) in self._moved)

    def _abort(self, is_wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Abort multipart uploads: nobody sees them, but they are paid for."""
        listed = self._call("list uploads", "list_multipart_uploads", Prefix=self._prefix)
        for item in filter(is_wanted, listed.get("Uploads", [])):
            self._call(
                "abort an upload", "abort_multipart_upload", Key=item["Key"], UploadId=item["UploadId"]
            )

    def _call(self, action: str, method: str, **arguments: Any) -> Any:
        return Trouble(Location(self.url), action).retry(
            lambda filesystem, _: filesystem.call_s3(method, Bucket=self._bucket, **arguments)
        )

    def _name(self, item: dict[str, Any]) -> str:
        """The file name of an object or an upload that S3 has listed."""
        key: str = item["Key"]
        return key.removeprefix(self._prefix)
