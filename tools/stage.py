"""`python -m tools.stage SHARDS...|CONFIG DIR`: copy shards to a disk that compute nodes see, where they
reach no bucket."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shlex
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Lock
from typing import Annotated, TypedDict

import typer
import yaml
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from configs.disk import words_of_disk
from configs.errors import ConfigError, DataError, ShardError, run_command
from configs.run.files import write_atomic
from configs.schema import RunConfig, Source
from data import storage
from data.index import Sidecar, load_sidecar
from data.location import Location
from data.ranges import NoRanges
from data.sources import Shard, expand
from tools.arguments import ShardsOrConfig, StorageOptions, Threads, named_data

BLOCK = 8 << 20
LOCK = ".stage.lock"
STAGED = ".staged.json"
"""A file in each folder that notes its complete copies: {file name: _Staged}."""


def stage(
    shards: ShardsOrConfig,
    folder: Annotated[
        Path, typer.Argument(help="Where the copies go: a config's into a folder per source.", metavar="DIR")
    ],
    storage_options: StorageOptions = None,
    threads: Threads = 8,
) -> None:
    """Copy shards, verify every copy, and say what to put into the config. What is there already and current
    is not copied again."""
    if re.match(r"\w+:/", str(folder)):
        raise ConfigError(f"{folder}: is no folder; copies go to a disk")
    data, config = named_data(shards, storage_options=storage_options)
    folder = folder.absolute()
    with ThreadPoolExecutor(threads) as pool, ExitStack() as stack:
        stop = Event()
        try:
            copies = []
            for source in data.sources:
                copies += _copies(source, folder / source.name if config else folder, data.index_dir)
            stack.enter_context(_alone(folder))
            current = pool.map(_Copy.look, copies)
            missing = [copy for copy, is_current in zip(copies, current, strict=True) if not is_current]
            _check_space(missing, folder)
            _copy_all(missing, pool, stop)
        except KeyboardInterrupt:
            print(
                "stopped; what is complete stays, and the same command goes on", file=sys.stderr, flush=True
            )
            os._exit(130)  # the threads would wait for what a silent endpoint does not send
        except OSError as error:
            _end_threads(pool, stop)
            raise ShardError(
                f"{error.filename or folder}: cannot be written: {error.strerror}; mend it and start again:"
                " what is complete stays"
            ) from None
        except BaseException:
            _end_threads(pool, stop)
            raise
    gigabytes = sum(copy.stat.size for copy in copies) / 1e9
    print(f"{folder}: {len(copies)} shards, {gigabytes:.2f} GB; {len(missing)} copied now and verified")
    print(_advice(shards, copies, config))


def _end_threads(pool: ThreadPoolExecutor, stop: Event) -> None:
    stop.set()
    pool.shutdown(wait=False, cancel_futures=True)


def _copy_all(copies: Sequence[_Copy], pool: ThreadPoolExecutor, stop: Event) -> None:
    """Make copies, and show how far they are. Raises what the first one that fails raises."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(f"{len(copies)} shards", total=sum(copy.stat.size for copy in copies))

        def advance(size: int) -> None:
            progress.advance(task, size)

        for future in as_completed([pool.submit(copy.make, advance, stop) for copy in copies]):
            future.result()


class _Staged(TypedDict):
    """What a complete copy is of."""

    size: int
    """Bytes."""
    tag: str
    """ETag or modification time of the original."""
    crc32: int
    """Of the bytes."""


class _Stopped(Exception):
    """Another copy has failed."""


@dataclass
class _Copy:
    """One shard and the folder where its copy goes."""

    shard: Shard
    folder: Path
    index_dir: str
    stat: storage.Stat = field(init=False)
    """Size and tag of the shard, as `look` has found them."""

    @property
    def path(self) -> Path:
        """Where the copy is."""
        return self.folder / self.shard.location.name

    def look(self) -> bool:
        """Whether the copy is there and current. Asks for the shard's size and tag, and removes what a copy
        that was cut off has left."""
        self.stat = storage.stat(self.shard.location)
        self._part.unlink(missing_ok=True)
        staged = _staged(self.folder).get(self.path.name)
        if staged is None:
            return False
        if staged["size"] != self.stat.size or staged["tag"] != self.stat.tag:
            print(
                f"{self.shard.location.url}: was replaced since it was copied; it is copied anew", flush=True
            )
            return False
        return self.path.is_file() and self.path.stat().st_size == self.stat.size

    def make(self, advance: Callable[[int], object], stop: Event) -> None:
        """Read, write, sync, verify, rename.

        Raises DataError if the shard is replaced meanwhile or is not what its full index says, ShardError if
        the disk gives back other bytes.
        """
        location = replace(self.shard.location, tag=self.stat.tag)
        crc = 0
        with self._part.open("wb") as file:

            def take(block: bytes) -> None:
                nonlocal crc
                if stop.is_set():
                    raise _Stopped
                crc = zlib.crc32(block, crc)
                file.write(block)
                advance(len(block))

            try:
                self._read(location, take)
            except _Stopped:
                return
            file.flush()
            os.fsync(file.fileno())
            # So that what is read back comes from the disk, not from memory.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if storage.stat(location) != self.stat:  # for file systems that have no If-Match
            raise DataError(f"{location.url}: was replaced while it was copied; start again")
        if _crc32(self._part) != crc:
            raise ShardError(
                f"{self._part}: does not hold what was written to it; look over this disk and start again"
            )
        sidecar = load_sidecar(self.shard, self.index_dir)
        if sidecar is not None and sidecar.full:
            _check_samples(self._part, sidecar, location.url)
        self._part.replace(self.path)
        _note(self.path, _Staged(size=self.stat.size, tag=self.stat.tag, crc32=crc))

    def _read(self, location: Location, take: Callable[[bytes], object]) -> None:
        """Give all bytes to `take`: range by range, or in one answer where the server gives none."""
        for start in range(0, self.stat.size, BLOCK):
            try:
                block = storage.read(location, start, min(start + BLOCK, self.stat.size))
            except NoRanges:
                if start:
                    raise
                return storage.pour(location, self.stat.size, take)
            take(block)

    @property
    def _part(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises ConfigError if another process copies into this folder."""
    with (folder / LOCK).open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another tools.stage is copying into it; wait for it, or stop it"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def _check_samples(path: Path, sidecar: Sidecar, url: str) -> None:
    """Compare a copy with the CRC32s of a full index. Raises DataError."""
    with path.open("rb") as file:
        for row in sidecar.table.to_pylist():
            crc = 0
            for part in ("audio", "text"):
                file.seek(row[f"{part}_offset"])
                crc = zlib.crc32(file.read(row[f"{part}_size"]), crc)
            known = row["crc32"] >= 0  # -1 where the sample could not be read
            if known and row["crc32"] != crc:
                raise DataError(
                    f"{url}: sample {row['key']!r} did not come as it was indexed (CRC32 differs); start"
                    " again: what is complete stays"
                )


def _copies(source: Source, folder: Path, index_dir: str) -> list[_Copy]:
    """Where a source's shards go. Raises ConfigError if the folder cannot be made, or holds shards that are
    not the source's."""
    copies = [
        _Copy(shard, folder / "validation" if shard.validation else folder, index_dir)
        for shard in expand(source)
    ]
    for subfolder in {copy.folder for copy in copies}:
        try:
            subfolder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{subfolder}: cannot be made: {words_of_disk(error)}") from None
        expected = {copy.path for copy in copies}
        strangers = sorted(path.name for path in subfolder.glob("*.tar") if path not in expected)
        if strangers:
            raise ConfigError(
                f"{subfolder}: holds {', '.join(strangers[:3])}, not of source {source.name}, which a glob"
                " would take, too; remove it or choose another DIR"
            )
    return copies


def _check_space(copies: Sequence[_Copy], folder: Path) -> None:
    """Raises ConfigError if the disk has too little room for the copies."""
    needed = sum(copy.stat.size for copy in copies)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{folder}: {needed / 1e9:.2f} GB are to be copied, {free / 1e9:.2f} GB are free; make room or"
            " choose another DIR"
        )


def _advice(shards: Sequence[str], copies: Sequence[_Copy], config: RunConfig | None) -> str:
    """What to type or write to train on the copies, in one line."""
    if config is None:
        return f"in the config: shards: {_yaml(f'{copies[0].folder}/*.tar')}"
    overrides: list[str] = []
    for copy in copies:
        key = "validation.shards" if copy.shard.validation else "shards"
        override = f"data.sources.{copy.shard.source.name}.{key}={_yaml([f'{copy.folder}/*.tar'])}"
        if override not in overrides:
            overrides.append(override)
    return f"python -m launch train {shards[0]} {shlex.join(overrides)}"


def _yaml(value: object) -> str:
    """A value as a config has it, in one line: with quotes, if folders are called `set [v2]`."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _staged(folder: Path) -> dict[str, _Staged]:
    """What is noted of the complete copies in a folder, by file name."""
    path = folder / STAGED
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):  # damaged: all is copied anew
        return {}


_noting = Lock()


def _note(path: Path, staged: _Staged) -> None:
    """Note that a copy is complete."""
    with _noting:
        notes = _staged(path.parent) | {path.name: staged}
        write_atomic(path.parent / STAGED, json.dumps(notes, indent=1))


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


if __name__ == "__main__":
    run_command(lambda: typer.run(stage))
