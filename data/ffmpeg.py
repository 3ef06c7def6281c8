"""FFmpeg: what libsndfile does not read, and what is said where there is no FFmpeg."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager

import numpy as np
import numpy.typing as npt

from data.mpeg import Unsound

ENDINGS = {"m4a", "mp4", "aac", "webm", "wma", "mka"}
"""Of formats that libsndfile does not read."""
CPU_SECONDS = 100
"""Time after which FFmpeg is taken to never end; it decodes 25 h of AAC in it."""
HELD_SECONDS = 600
"""What is kept while FFmpeg decodes: of what is longer, the wanted stretch is decoded again."""
PART = 1 << 20
"""Bytes that are taken from it at a time."""
NEEDED = "needs FFmpeg"
"""What the reason begins with, after `the audio`, where there is none."""


def has_ffmpeg() -> bool:
    """Whether there is an FFmpeg on this machine's PATH."""
    return shutil.which("ffmpeg") is not None


def needs_ffmpeg(reason: str) -> bool:
    """Whether this is why a sample cannot be used: only FFmpeg reads it, and there was none."""
    return reason.startswith(f"the audio {NEEDED}")


def ffmpeg_would_win(count: int) -> str:
    """For a summary, after "N of what": that they would be won by installing FFmpeg."""
    verb = "needs" if count == 1 else "need"
    return f"{verb} FFmpeg, and would be won by installing it (apt-get install ffmpeg)"


def decode(content: bytes, rate: int) -> tuple[npt.NDArray[np.int16] | None, int]:
    """Decode a file to mono at `rate` (Hz): its samples, None if there are more than are kept, and how many
    there are. Raises Unsound."""
    held: list[bytes] = []
    count = 0
    for part in _parts(content, rate):
        count += len(part) // 2
        held = [*held, part] if count <= HELD_SECONDS * rate else []
    if count > HELD_SECONDS * rate:
        return None, count
    return np.frombuffer(b"".join(held), np.int16), count


def stretch(content: bytes, rate: int, first: int, wanted: int) -> npt.NDArray[np.int16]:
    """Samples [first, first + wanted) of what `decode` makes: from the beginning on, as a leap would not be
    exact."""
    held, at, end = bytearray(), 0, 2 * (first + wanted)
    with closing(_parts(content, rate)) as parts:
        for part in parts:
            held += part[max(0, 2 * first - at) : max(0, end - at)]
            at += len(part)
            if at >= end:
                break
    return np.frombuffer(held, np.int16)


def _parts(content: bytes, rate: int) -> Generator[bytes]:
    """What FFmpeg makes of a file: int16, mono, in parts of whole samples. Raises Unsound."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise Unsound(
            f"{NEEDED}, and there is no `ffmpeg` on this machine's PATH: install it (apt-get install ffmpeg,"
            " or conda install ffmpeg), or convert the clips to FLAC"
        )
    with memory_file(content) as descriptor, tempfile.TemporaryFile() as errors:
        command = [program, "-nostdin", "-v", "error", "-timelimit", str(CPU_SECONDS)]
        command += ["-i", (name := f"/proc/self/fd/{descriptor}")]
        command += ["-vn", "-ac", "1", "-ar", str(rate), "-f", "s16le", "-"]
        # As floats FFmpeg would not normalise the mix to mono.
        with subprocess.Popen(
            command, pass_fds=[descriptor], stdout=subprocess.PIPE, stderr=errors
        ) as process:
            assert process.stdout is not None
            try:
                while part := process.stdout.read(PART):
                    yield part
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
            said = said or f"FFmpeg ended with {process.returncode} (it is stopped after {CPU_SECONDS} s)"
            raise Unsound(f"cannot be decoded: {said.splitlines()[-1].removeprefix(f'{name}: ')}")


@contextmanager
def memory_file(content: bytes) -> Iterator[int]:
    """A descriptor of these bytes. Over BytesIO soundfile calls back into Python at every read, which slows
    the main thread."""
    descriptor = os.memfd_create("audio")
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
