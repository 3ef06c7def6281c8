"""What was read from elsewhere, kept on a node's own disk. The ranks of a node share it, and runs may.

Blocks of BLOCK bytes of a shard are files of their own, named by the shard's URL and tag and written by
rename, so that a reader finds a whole block or none whoever dies meanwhile; a CRC32 before the content tells
of damage. Nobody waits for anybody: where two ranks miss the same block, both read it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data import storage
from data.location import Location
from data.retry import STATS

BLOCK = 1 << 20
DIGEST = 4
"""Bytes before the content of a block."""
SHARE = 0.02
"""Share of the limit that may be written before what is there is counted and cut down."""
ABANDONED = 3600.0
"""Seconds after which a file that is still being written counts as left behind."""


class Cache:
    """Blocks of shards on this node's disk. Safe to use from several threads and processes."""

    def __init__(self, folder: Path, gigabytes: float) -> None:
        self.folder, self.limit = folder, int(gigabytes * 1e9)
        self._written, self._told, self._lock = 0, False, threading.Lock()
        self._cut_down()

    def read(self, location: Location, start: int, end: int) -> bytes:
        """Bytes [start, end) of a shard, as `storage.read` gives them. Raises what it raises; a disk that
        fails is told of once, and done without."""
        if location.is_local or not (location.size and location.tag) or start == end:
            return storage.read(location, start, end)
        numbers = range(start // BLOCK, (end - 1) // BLOCK + 1)
        blocks = {number: self._load(location, number) for number in numbers}
        missing = [number for number in numbers if not blocks[number]]
        STATS["cached"] += sum(map(len, blocks.values()))
        for neighbours in _neighbours(missing):
            first = neighbours.start * BLOCK
            content = storage.read(location, first, min(neighbours.stop * BLOCK, location.size))
            for number in neighbours:
                blocks[number] = content[number * BLOCK - first : (number + 1) * BLOCK - first]
                self._keep(location, number, blocks[number])
        whole = b"".join(blocks.values())
        return whole[start - numbers[0] * BLOCK : end - numbers[0] * BLOCK]

    def _path(self, location: Location, number: int) -> Path:
        name = hashlib.sha256(f"{location.url}\0{location.tag}\0{location.size}".encode()).hexdigest()[:24]
        return self.folder / name[:2] / f"{name}-{number}"

    def _load(self, location: Location, number: int) -> bytes:
        """A block; empty if it is not there, or damaged."""
        path = self._path(location, number)
        with suppress(OSError):
            kept = path.read_bytes()
            digest, content = kept[:DIGEST], kept[DIGEST:]
            is_whole = len(content) == min(BLOCK, location.size - number * BLOCK)
            if is_whole and digest == _digest(content):
                with suppress(OSError):  # another user's, or a disk that may only be read
                    os.utime(path)  # it is in use
                return content
        return b""

    def _keep(self, location: Location, number: int, content: bytes) -> None:
        path = self._path(location, number)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(_digest(content) + content)
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            if not self._told:
                self._told = True
                print(
                    f"data.cache_dir: {self.folder}: {error.strerror}; goes on without keeping what it reads",
                    file=sys.stderr,
                    flush=True,
                )
            return
        with self._lock:
            self._written += len(content)
            if self._written < SHARE * self.limit:
                return
            self._written = 0
        self._cut_down()

    def _cut_down(self) -> None:
        """Remove what was not used for longest until the rest fits, and what killed processes have left."""
        blocks = []
        try:
            files = list(self.folder.glob("*/*"))
        except OSError:  # the disk is gone; that is told when something is to be kept
            return
        for file in files:
            with suppress(OSError):  # another rank is at it, too
                kept = file.stat()
                if file.suffix != ".tmp":
                    blocks.append(_Kept(kept.st_mtime, kept.st_size, file))
                elif time.time() - kept.st_mtime > ABANDONED:
                    file.unlink()
        held = sum(block.size for block in blocks)
        for block in sorted(blocks):
            if held <= (1 - SHARE) * self.limit:
                return
            with suppress(OSError):
                block.file.unlink(missing_ok=True)
                held -= block.size


class _Kept(NamedTuple):
    """A block on the disk; those sort first that were not used for longest."""

    used: float
    size: int
    file: Path


def _digest(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(DIGEST, "little")


def _neighbours(numbers: Sequence[int]) -> Iterator[range]:
    """Ascending numbers, cut where one is left out."""
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            yield range(numbers[start], numbers[end - 1] + 1)
            start = end
