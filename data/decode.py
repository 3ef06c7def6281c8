"""Audio files in memory -> 16 kHz mono int16, in threads: libsndfile and soxr release the GIL."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from configs.errors import DataError

SAMPLE_RATE = 16_000  # Hz
FFMPEG_ONLY = {"m4a", "mp4", "aac", "webm", "wma", "mka"}
"""Endings that libsndfile does not read."""
FFMPEG_SECONDS = 100
"""CPU time after which FFmpeg is taken to never end; it decodes 25 h of AAC in it."""
READ_FRAMES = 1 << 20
LAST_FRAMES = 256
COMPLETE = 0.9
"""Share of the length in the header that must be there; some encoders of MP3 state it a little off."""
MP3_FRAME = 200
"""Bytes at the beginning of an MP3 that say, by Xing or Info, that it states its length."""
WRITTEN_INTO_A_PIPE = 0x7FFF_0000
"""Sizes from here on in a RIFF header are not meant: the encoder could not go back to put the true one."""
OVERDRIVEN = 8
"""What no recording exceeds for long, in multiples of full scale: what is less is clipped, as on any way."""
NO_SAMPLES = "the audio has no samples (0 s)"
UNKNOWN_FRAMES = 1 << 32  # a day at 48 kHz: more is a header that does not know
AUDIO_ENDINGS = {"wav", "flac", "ogg", "oga", "mp3", "opus", "aiff", "aif", "au", "w64"} | FFMPEG_ONLY
"""Endings of tar members that are taken for audio."""


class BadSample(Exception):
    """The content of a sample cannot be used; the message says why."""


class Skipped(BadSample):
    """A sound sample that the configuration leaves out (too long); it does not count as bad."""


@dataclass(frozen=True)
class AudioInfo:
    """What an audio file says of itself; rate (Hz) and channels are 0 where FFmpeg has to read it."""

    seconds: float
    rate: int
    channels: int


Fit = Callable[[float], tuple[float, float] | None]
"""Length of a clip -> the stretch to decode (start, length), or None for all of it; in seconds. May raise
Skipped."""


def decode(content: bytes, ending: str, fit: Fit = lambda seconds: None) -> npt.NDArray[np.int16]:
    """Decode an audio file, or the stretch of it that `fit` chooses, to 16 kHz mono.

    No more than that is decoded, but of FFmpeg's formats, which are decoded whole first. Returns (n,) int16.
    Raises BadSample for content that is not sound audio of at least one sample.
    """
    if _needs_ffmpeg(content, ending):
        whole = _ffmpeg(content)
        first, count = _frames(fit(len(whole) / SAMPLE_RATE), SAMPLE_RATE)
        return whole[first : first + count].copy()  # writable, and the rest is let go
    return _sndfile(content, fit)


def probe(content: bytes, ending: str) -> AudioInfo:
    """Length and form of an audio file, from its headers where they say so; of FLAC the end is decoded, too.
    Raises BadSample."""
    if _needs_ffmpeg(content, ending):
        return AudioInfo(len(_ffmpeg(content)) / SAMPLE_RATE, 0, 0)
    with _open(content) as file:
        info = AudioInfo(file.frames / file.samplerate, file.samplerate, file.channels)
        if not info.seconds:
            raise BadSample(NO_SAMPLES)
        ends = file.format != "FLAC" or _has_end(file)  # whose header tells nothing of what is not there
    if not ends:
        _sndfile(content, lambda seconds: None)  # says what is wrong
    return info


def _has_end(file: soundfile.SoundFile) -> bool:
    """Whether the last samples are there."""
    last = min(file.frames, LAST_FRAMES)
    try:
        file.seek(file.frames - last)
        return len(file.read(last, dtype="int16")) == last
    except soundfile.LibsndfileError:
        return False


def _needs_ffmpeg(content: bytes, ending: str) -> bool:
    if not content:
        raise BadSample("the audio is empty (0 bytes)")
    return ending.rsplit(".", 1)[-1] in FFMPEG_ONLY


def _frames(stretch: tuple[float, float] | None, rate: int) -> tuple[int, int]:
    """First frame and number of frames of a stretch."""
    if stretch is None:
        return 0, UNKNOWN_FRAMES
    start, length = stretch
    return round(start * rate), round(length * rate)


def _sndfile(content: bytes, fit: Fit) -> npt.NDArray[np.int16]:
    with _open(content) as file:
        rate = file.samplerate
        as_it_is = (rate, file.channels, file.subtype) == (SAMPLE_RATE, 1, "PCM_16")
        first, count = _frames(fit(file.frames / rate), rate)
        audio = _read(file, first, count, "int16" if as_it_is else "float32")
        wanted = min(count, file.frames - first)
        if len(audio) < wanted * COMPLETE and _knows_its_length(file, content):
            raise BadSample(
                f"the audio is cut off: {len(audio) / rate:.1f} of {wanted / rate:.1f} s are there, counted"
                f" from second {first / rate:.1f}"
            )
    if not len(audio):
        raise BadSample(NO_SAMPLES)
    if as_it_is:
        return audio[:, 0]
    mono = _mix(audio)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    if not np.isfinite(mono).all():
        raise BadSample("the audio holds values that are not finite")
    loudness = np.abs(mono)
    if np.count_nonzero(loudness > OVERDRIVEN) > len(mono) / 2:
        raise BadSample(
            f"most of the audio lies far beyond full scale, which is 1 (it reaches {loudness.max():g}): were"
            " integers written as floats?"
        )
    return np.clip(np.rint(mono * 32768), -32768, 32767).astype(np.int16)


def _read(file: soundfile.SoundFile, first: int, count: int, dtype: str) -> npt.NDArray[Any]:
    """Frames from `first` on, `count` or as many as there are: (n, channels)."""
    if first and file.seekable():
        file.seek(first)
    elif first:  # GSM 6.10 and G.721 are read from the beginning only
        for skipped in range(0, first, READ_FRAMES):
            file.read(min(READ_FRAMES, first - skipped), dtype="float32")
    # In parts: memory for the length that a damaged header claims may not be there.
    parts = []
    while count:
        part = file.read(min(count, READ_FRAMES), dtype=dtype, always_2d=True)
        if not len(part):
            break
        parts.append(part)
        count -= len(part)
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty((0, file.channels), dtype)


def _knows_its_length(file: soundfile.SoundFile, content: bytes) -> bool:
    """Whether the number of frames is more than an estimate."""
    beginning = _without_id3(content)[:MP3_FRAME]
    return file.format != "MP3" or b"Xing" in beginning or b"Info" in beginning


def _mix(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(n, channels) -> (n,), the mean of the channels."""
    if audio.shape[1] == 1:
        return audio[:, 0]
    if audio.shape[1] == 2:  # x.mean(axis=1) takes 17 ms for 30 s, this 0.8
        return (audio[:, 0] + audio[:, 1]) * np.float32(0.5)
    return audio.mean(axis=1, dtype=np.float32)


def _without_id3(content: bytes) -> bytes:
    """The file without its leading ID3 tag: its cover art would count as audio where the length of an MP3 is
    estimated from its bytes."""
    if content[:3] != b"ID3" or len(content) < 10:
        return content
    size = 0
    for byte in content[6:10]:  # seven bits each
        size = size << 7 | byte & 0x7F
    return content[10 + size :] or content


def _ffmpeg(content: bytes) -> npt.NDArray[np.int16]:
    program = shutil.which("ffmpeg")
    if program is None:
        raise DataError(
            "M4A, AAC, MP4 and WebM audio needs FFmpeg, and there is no `ffmpeg` on this machine's PATH. "
            "Install it (apt-get install ffmpeg, or conda install ffmpeg), or convert the clips to FLAC."
        )
    with _memory_file(content) as descriptor:
        command = [program, "-nostdin", "-v", "error", "-timelimit", str(FFMPEG_SECONDS)]
        command += ["-i", f"/proc/self/fd/{descriptor}"]
        command += ["-vn", "-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "s16le", "-"]
        done = subprocess.run(command, pass_fds=[descriptor], capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        said = said or f"FFmpeg ended with {done.returncode} (it is stopped after {FFMPEG_SECONDS} s)"
        raise BadSample(f"the audio cannot be decoded: {said.splitlines()[-1]}")
    if not done.stdout:
        raise BadSample(NO_SAMPLES)
    return np.frombuffer(done.stdout, np.int16)  # as floats FFmpeg would not normalise the mix to mono


@contextmanager
def _open(content: bytes) -> Iterator[soundfile.SoundFile]:
    # Libsndfile takes the end of a file for the end of the audio.
    stated = int.from_bytes(content[4:8], "little") if content[:4] == b"RIFF" else 0
    if len(content) < stated * COMPLETE and stated < WRITTEN_INTO_A_PIPE:
        raise BadSample(f"the audio is cut off: {len(content):,} of {stated + 8:,} bytes are there")
    with _memory_file(_without_id3(content)) as descriptor:
        try:
            with soundfile.SoundFile(descriptor, closefd=False) as file:
                if file.frames >= UNKNOWN_FRAMES:
                    raise BadSample(
                        "the audio's header does not say how long it is (an encoder wrote it into a pipe?);"
                        " encode it to a file again"
                    )
                yield file
        except soundfile.LibsndfileError as error:
            raise BadSample(f"the audio cannot be decoded: {error.error_string}") from None


@contextmanager
def _memory_file(content: bytes) -> Iterator[int]:
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
