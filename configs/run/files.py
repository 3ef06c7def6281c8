"""Files of a run that others may read at any time: replaced as a whole, or appended a line at a time."""

from __future__ import annotations

import functools
import json
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from configs.disk import naming


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see the old or the new content, never a part."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                yield file
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@dataclass
class Lines:
    """What the files hold. values: of each line; places: of the same lines (FILE:LINE); torn: places of lines
    that are no JSON objects, as a full disk or a machine that lost power leaves them."""

    values: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)


class JsonLines:
    """A folder of JSON-lines files that any number of processes append to, each to a file of its own.

    Several clients of a network file system that append to one file overwrite each other's lines. Each line
    is written by one open, write and close: NFS shows it to other machines when it is closed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def append(self, value: dict[str, Any]) -> None:
        """Add a line to the file of this process. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _file_of_process(os.getpid())
        line = json.dumps(value, ensure_ascii=False) + "\n"
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            with naming(path):
                if _is_cut_off(descriptor):
                    line = "\n" + line
                _write_all(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def read(self) -> Lines:
        """All lines, file by file. Raises OSError. The same name of a file never comes from two processes."""
        lines = Lines()
        for path in self._files():
            text = path.read_text(encoding="utf-8", errors="replace")
            for number, line in enumerate(text.split("\n"), 1):
                if line:
                    _read_line(line, f"{path}:{number}", lines)
        return lines

    def size(self) -> int:
        """Bytes of all files, to see cheaply whether there is more."""
        return sum(path.stat().st_size for path in self._files())

    def _files(self) -> list[Path]:
        """Raises OSError if they may not be seen, which `glob` would hide."""
        try:
            return sorted(path for path in self.folder.iterdir() if path.suffix == ".jsonl")
        except FileNotFoundError:
            return []


def _read_line(line: str, place: str, into: Lines) -> None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        value = None
    if isinstance(value, dict):
        into.values.append(value)
        into.places.append(place)
    else:
        into.torn.append(place)


def _write_all(descriptor: int, content: bytes) -> None:
    """Write all of it: a disk that becomes full takes a part, and says so only when it is asked again."""
    while content:
        content = content[os.write(descriptor, content) :]


@functools.cache
def _file_of_process(pid: int) -> str:
    """HOST-PID-RANDOM.jsonl: containers may share a host's name, and a host gives its numbers out again."""
    return f"{socket.gethostname()}-{pid}-{secrets.token_hex(4)}.jsonl"


def _is_cut_off(descriptor: int) -> bool:
    """Whether the last line has no end: a full disk took only a part of it."""
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
