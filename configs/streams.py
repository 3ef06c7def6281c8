"""Standard input, output and error of a program: there, in UTF-8, whatever the shell made of them, and nobody
has to listen."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO, cast

PATIENCE = 1.0
"""Seconds that training waits for a reader who does not read (Ctrl-S, a pager that waits for a key)."""


def speak_utf8() -> None:
    """Begin this program anew in Python's UTF-8 mode if the locale has another encoding, which would be that
    of file names. Call before it does anything."""
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"  # of the programs that this one starts, too
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def open_streams(*, unheeded: bool = False) -> None:
    """Make this process's output take any text, whatever the locale: a file or a pipe gets UTF-8, a terminal
    gets what it cannot show as an escape (\\u6f22).

    Streams that are closed become /dev/null, as the next file to be opened would take their place. When
    nobody reads any more, the program ends as `cat` does; if it is `unheeded`, only its words are lost.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if not _is_open(descriptor):
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, descriptor)  # programs that this one starts have it, too
            if nothing != descriptor:
                os.close(nothing)
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            stream = open(descriptor, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        if name != "stdin" and _descriptor(stream) == descriptor:
            stream = _rewrap(cast(io.TextIOWrapper, stream), _Unheeded if unheeded else _Output)
        setattr(sys, name, stream)


class _Output(io.FileIO):
    """Raw output that ends the program, as SIGPIPE would, when nobody reads any more; but cleanly."""

    _is_over = False

    def write(self, content: memoryview) -> int | None:  # type: ignore[override]
        if self._is_over:
            return len(content)
        try:
            return super().write(content)
        except BrokenPipeError:
            self._is_over = True
            raise SystemExit(128 + signal.SIGPIPE) from None
        except OSError as error:
            self._is_over = True
            error.filename = str(Path(f"/proc/self/fd/{self.fileno()}").readlink())
            raise


class _Unheeded(io.FileIO):
    """Raw output that never fails and never waits for long: what cannot be written is lost, and the next
    words are tried again."""

    _is_stuck = False

    def write(self, content: memoryview) -> int:  # type: ignore[override]
        piece = memoryview(content)[: select.PIPE_BUF]  # so much is taken at once by whoever takes anything
        try:
            if self._takes():
                return super().write(piece) or 0
        except OSError:  # nobody reads, the terminal is gone, the disk is full
            pass
        return len(content)

    def _takes(self) -> bool:
        """Whether there is room; who has not read for long is not waited for again."""
        poll = select.poll()
        poll.register(self, select.POLLOUT)
        self._is_stuck = not poll.poll(0 if self._is_stuck else 1000 * PATIENCE)
        return not self._is_stuck


def _rewrap(stream: io.TextIOWrapper, kind: type[io.FileIO]) -> io.TextIOWrapper:
    stream.flush()
    descriptor = stream.fileno()
    if kind is _Unheeded and stream.isatty():
        # Opened anew, so that it need not be waited for: the shell's own stays as it is.
        with suppress(OSError):  # another user's
            descriptor = os.open(
                f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            )
    return io.TextIOWrapper(
        io.BufferedWriter(kind(descriptor, "w", closefd=False)),
        encoding=stream.encoding if stream.isatty() else "utf-8",
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
    )


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _descriptor(stream: TextIO) -> int | None:
    """None for what only looks like a stream, as in a notebook or a test."""
    try:
        return stream.fileno()
    except (OSError, AttributeError):
        return None
