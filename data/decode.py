"""Audio files in memory -> 16 kHz mono int16, in threads: libsndfile and soxr release the GIL."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from configs.errors import DataError

SAMPLE_RATE = 16_000  # Hz
FFMPEG_ONLY = {"m4a", "mp4", "aac", "webm", "wma", "mka"}
"""Endings that libsndfile does not read."""
READ_FRAMES = 1 << 20
UNKNOWN_FRAMES = 1 << 32  # a day at 48 kHz: more is a header that does not know
AUDIO_ENDINGS = {"wav", "flac", "ogg", "oga", "mp3", "opus", "aiff", "aif", "au", "w64"} | FFMPEG_ONLY
"""Endings of tar members that are taken for audio."""


class BadSample(Exception):
    """The content of a sample cannot be used; the message says why."""


class Skipped(BadSample):
    """A sound sample that the configuration leaves out (too long); it does not count as bad."""


def decode(content: bytes, ending: str) -> npt.NDArray[np.int16]:
    """Decode an audio file to 16 kHz mono.

    Returns (n,) int16. Raises BadSample for content that is not sound audio of at least one sample.
    """
    if not content:
        raise BadSample("the audio is empty (0 bytes)")
    audio = _ffmpeg(content) if ending.rsplit(".", 1)[-1] in FFMPEG_ONLY else _sndfile(content)
    if not len(audio):
        raise BadSample("the audio has no samples (0 s)")
    if not np.isfinite(audio).all():
        raise BadSample("the audio holds values that are not finite")
    return np.clip(np.rint(audio * 32768), -32768, 32767).astype(np.int16)


def duration(content: bytes, ending: str) -> float:
    """Length of an audio file in seconds. Raises BadSample."""
    if not content:
        raise BadSample("the audio is empty (0 bytes)")
    if ending.rsplit(".", 1)[-1] in FFMPEG_ONLY:
        return len(_ffmpeg(content)) / SAMPLE_RATE
    with _open(content) as file:
        frames, rate = file.frames, file.samplerate
    if not frames:
        raise BadSample("the audio has no samples (0 s)")
    return frames / rate


def _sndfile(content: bytes) -> npt.NDArray[np.float32]:
    with _open(content) as file:
        rate = file.samplerate
        parts = []  # in parts, because memory for the length that a damaged header claims may not be there
        while len(part := file.read(READ_FRAMES, dtype="float32", always_2d=True)):
            parts.append(part)
    if not parts:
        raise BadSample("the audio has no samples (0 s)")
    audio = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if audio.shape[1] == 1:
        mono = audio[:, 0]
    elif audio.shape[1] == 2:
        mono = (audio[:, 0] + audio[:, 1]) * np.float32(0.5)  # x.mean(axis=1) takes 17 ms for 30 s, this 0.8
    else:
        mono = audio.mean(axis=1, dtype=np.float32)
    return soxr.resample(mono, rate, SAMPLE_RATE) if rate != SAMPLE_RATE and len(mono) else mono


def _ffmpeg(content: bytes) -> npt.NDArray[np.float32]:
    program = shutil.which("ffmpeg")
    if program is None:
        raise DataError(
            "M4A, AAC, MP4 and WebM audio needs FFmpeg, and there is no `ffmpeg` on this machine's PATH. "
            "Install it (apt-get install ffmpeg, or conda install ffmpeg), or convert the clips to FLAC."
        )
    with _memory_file(content) as descriptor:
        command = [program, "-nostdin", "-v", "error", "-i", f"/proc/self/fd/{descriptor}", "-vn", "-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "s16le", "-"]
        done = subprocess.run(command, pass_fds=[descriptor], capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() or f"FFmpeg ended with {done.returncode}"
        raise BadSample(f"the audio cannot be decoded: {said.splitlines()[-1]}")
    return (np.frombuffer(done.stdout, np.int16) / 32768).astype(np.float32)  # as floats FFmpeg would not normalise the mix to mono


@contextmanager
def _open(content: bytes) -> Iterator[soundfile.SoundFile]:
    with _memory_file(content) as descriptor:
        try:
            with soundfile.SoundFile(descriptor, closefd=False) as file:
                if file.frames >= UNKNOWN_FRAMES:
                    raise BadSample("the audio's header does not say how long it is (an encoder wrote it into a pipe?); encode it to a file again")
                yield file
        except soundfile.LibsndfileError as error:
            raise BadSample(f"the audio cannot be decoded: {error.error_string}") from None


@contextmanager
def _memory_file(content: bytes) -> Iterator[int]:
    """A descriptor of these bytes. Over BytesIO soundfile calls back into Python at every read, which slows the main thread."""
    descriptor = os.memfd_create("audio")
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
