"""Files that go to any URL that fsspec opens, or come from there: an object is there whole, or as it was
before."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fsspec.asyn import get_loop
from fsspec.callbacks import Callback
from fsspec.core import split_protocol

from configs.run.files import write_atomic
from data.location import Location
from data.retry import Trouble

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""They have no folders: to make one would at most make a bucket that nobody asked for."""


def upload(file: Path, location: Location) -> None:
    """Copy a file to a URL, a large one to an object store in several parts at a time; what is there already
    is replaced.

    Raises DataError where trying again would not help (no bucket, denied), ShardError when it has not helped
    for long.
    """
    trouble = Trouble(location, "write it")

    def put(filesystem: Any, path: str) -> None:
        if split_protocol(location.url)[0] not in OBJECT_STORES:
            filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        if not filesystem.async_impl:
            filesystem.put_file(str(file), path)
            return
        copying = asyncio.run_coroutine_threadsafe(
            filesystem._put_file(str(file), path, callback=_Progress(trouble)), get_loop()
        )
        try:
            copying.result()
        except BaseException:
            copying.cancel()  # else it would go on in fsspec's thread after Ctrl-C
            raise

    trouble.retry(put)


def download(location: Location, file: Path) -> None:
    """Copy what is at a URL to a file. Raises as `upload` does."""
    trouble = Trouble(location, "read it")
    trouble.retry(lambda filesystem, path: filesystem.get_file(path, str(file), callback=_Progress(trouble)))


class _Progress(Callback):
    """Counts every piece of a file as progress."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__()
        self._trouble = trouble

    def relative_update(self, inc: int = 1) -> None:
        self._trouble.progressed()


def write(content: bytes, location: Location) -> None:
    """Write a small object, which is there whole or as it was before. Raises as `upload` does."""

    def put(filesystem: Any, path: str) -> None:
        if location.is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(path), content)
        else:
            filesystem.pipe_file(path, content)

    Trouble(location, "write it").retry(put)
