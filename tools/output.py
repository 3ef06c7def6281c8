"""Folders, here or on S3, that a tool writes: complete, or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsspec.core import split_protocol

from configs.errors import ConfigError, EarwitnessError
from data.location import Location, open_filesystem
from data.patience import Trouble
from data.upload import upload


@dataclass(frozen=True)
class Output:
    """A temporary folder to write into, and what is to be called with a file of it that is complete, where that may leave before the others."""

    folder: Path
    complete: Callable[[Path], None]


@contextmanager
def new_folder(out: str, last: str = "") -> Iterator[Output]:
    """A folder, or a prefix on S3, that is there when the block ends well, and leaves nothing when it does not.

    A temporary folder beside `out` takes its name; to S3 files are copied from $TMPDIR when they are complete, the one called `last` after
    all others. Raises ConfigError if `out` holds something already or cannot be made, DataError if the bucket is missing or access is denied.
    """
    protocol, path = split_protocol(out)
    if protocol in (None, "file", "local"):
        with _folder(Path(path)) as folder:
            yield Output(folder, lambda file: None)
    elif protocol in ("s3", "s3a"):
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
    """What moves a file below an empty prefix on S3; all such objects are removed again when the block does not end well."""
    filesystem, path = open_filesystem(Location(url))
    bucket, prefix, _ = filesystem.split_path(path)
    prefix = f"{prefix}/" if prefix else ""
    there = Trouble(Location(url), "read what is there").retry(lambda: filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=3))
    if names := [found["Key"].removeprefix(prefix) for found in there.get("Contents", [])]:
        raise ConfigError(
            f"{url}: exists and is not empty ({', '.join(names)}, ...); choose another place, or remove it, perhaps of a run that was killed: "
            f"aws s3 rm --recursive {url}/"
        )

    def probe() -> None:  # before the work of hours: may this be written?
        filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}probe")
        _abort_uploads(filesystem, bucket, prefix)  # those of a run that was killed, too

    Trouble(Location(url), "write there").retry(probe)
    moved = []

    def put(file: Path) -> None:
        moved.append(f"{url}/{file.name}")
        upload(file, Location(moved[-1]))
        file.unlink()

    try:
        yield put
    except BaseException:
        with suppress(EarwitnessError):
            Trouble(Location(url), "remove what was written").retry(lambda: _abort_uploads(filesystem, bucket, prefix))
            Trouble(Location(url), "remove what was written").retry(lambda: filesystem.rm(moved) if moved else None)
        raise


def _abort_uploads(filesystem: Any, bucket: str, prefix: str) -> None:
    """Abort multipart uploads below a prefix: nobody sees them, but they are paid for."""
    for begun in filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix).get("Uploads", []):
        filesystem.abort_mpu(bucket, begun["Key"], begun["UploadId"])
