"""Audio files in memory -> 16 kHz mono int16, in threads: libsndfile and soxr release the GIL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from data import containers, ffmpeg
from data.ffmpeg import memory_file
from data.kinds import what_it_is
from data.mpeg import COMPLETE, Unsound

SAMPLE_RATE = 16_000  # Hz
READ_FRAMES = 1 << 20
LAST_FRAMES = 256
UNKNOWN_FORMATS = (1, 4)
"""Codes of libsndfile for a format, and an encoding, that it does not know."""
MP3_FRAME = 200
"""Bytes at the beginning of an MP3 that say, by Xing or Info, that it states its length."""
OVERDRIVEN = 8
"""What no recording exceeds for long, in multiples of full scale: what is less is clipped, as on any way."""
NO_SAMPLES = "the audio has no samples (0 s)"
UNKNOWN_FRAMES = 1 << 32  # a day at 48 kHz: more is a header that does not know
AUDIO_ENDINGS = (
    {"wav", "flac", "ogg", "oga", "opus", "mp3", "mp2"}
    | {"aiff", "aif", "aifc", "au", "w64", "caf"}
    | ffmpeg.ENDINGS
)
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
    """Decode an audio file, or the stretch of it that `fit` chooses, to 16 kHz mono. What it is, its content
    says; the ending is asked where that is of no known format.

    Memory is taken for no more than that stretch, and ten minutes of what FFmpeg has to read. Returns (n,)
    int16. Raises BadSample for content that is not sound audio of at least one sample, or that only FFmpeg
    reads where there is none.
    """
    files = _files(content, ending)
    if files is None:
        return _stretch_by_ffmpeg(content, fit)
    try:
        return _sndfile(files[0], fit) if len(files) == 1 else _chain(files, fit)
    except _Unread:
        if not _is_ffmpegs(files):
            raise
        return _stretch_by_ffmpeg(content, fit)


def probe(content: bytes, ending: str) -> AudioInfo:
    """Length and form of an audio file, from its headers where they say so; of FLAC the end is decoded, too.
    Raises BadSample."""
    files = _files(content, ending)
    try:
        infos = None if files is None else [_probe(file) for file in files]
    except _Unread:
        if files is None or not _is_ffmpegs(files):
            raise
        infos = None
    if infos is None:
        return AudioInfo(_by_ffmpeg(content)[1] / SAMPLE_RATE, 0, 0)
    return AudioInfo(sum(info.seconds for info in infos), infos[0].rate, infos[0].channels)


def in_words(seconds: float, limit: float) -> str:
    """A length that exceeds a limit, with as many digits as tell the two apart."""
    digits = next((n for n in range(1, 9) if f"{seconds:.{n}f}" != f"{limit:.{n}f}"), 9)
    return f"{seconds:.{digits}f}"


class _Unread(BadSample):
    """Libsndfile does not know this format."""


def _files(content: bytes, ending: str) -> list[bytes] | None:
    """The files in this content for libsndfile, None where FFmpeg has to read it."""
    if not content:
        raise BadSample("the audio is empty (0 bytes)")
    try:
        return containers.files(content, ending.rsplit(".", 1)[-1] in ffmpeg.ENDINGS)
    except Unsound as error:
        raise BadSample(f"the audio {error}") from None


def _is_ffmpegs(files: list[bytes]) -> bool:
    """Whether FFmpeg may read what libsndfile does not know: another codec in a container that both do."""
    return what_it_is(files[0]).startswith("audio")


def _probe(content: bytes) -> AudioInfo:
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


def _frames(stretch: tuple[float, float] | None, rate: int) -> tuple[int, int]:
    """First frame and number of frames of a stretch."""
    if stretch is None:
        return 0, UNKNOWN_FRAMES
    start, length = stretch
    return round(start * rate), round(length * rate)


def _chain(files: list[bytes], fit: Fit) -> npt.NDArray[np.int16]:
    """Decode files that follow one another as one."""
    lengths = [_probe(file).seconds for file in files]
    start, length = fit(sum(lengths)) or (0.0, float("inf"))
    pieces = []
    for file, seconds in zip(files, lengths, strict=True):
        first, end = max(0.0, start), min(seconds, start + length)
        if first < end:
            whole = (first, end) == (0.0, seconds)
            pieces.append(_sndfile(file, _constant(None if whole else (first, end - first))))
        start -= seconds
    return np.concatenate(pieces) if pieces else np.empty(0, np.int16)


def _constant(stretch: tuple[float, float] | None) -> Fit:
    return lambda seconds: stretch


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
    beginning = content[:MP3_FRAME]
    return file.format != "MP3" or b"Xing" in beginning or b"Info" in beginning


def _mix(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(n, channels) -> (n,), the mean of the channels."""
    if audio.shape[1] == 1:
        return audio[:, 0]
    if audio.shape[1] == 2:  # x.mean(axis=1) takes 17 ms for 30 s, this 0.8
        return (audio[:, 0] + audio[:, 1]) * np.float32(0.5)
    return audio.mean(axis=1, dtype=np.float32)


def _stretch_by_ffmpeg(content: bytes, fit: Fit) -> npt.NDArray[np.int16]:
    """Decode the stretch that `fit` chooses. How long the audio is, FFmpeg says by decoding it only."""
    samples, count = _by_ffmpeg(content)
    first, wanted = _frames(fit(count / SAMPLE_RATE), SAMPLE_RATE)
    if samples is None:
        return ffmpeg.stretch(content, SAMPLE_RATE, first, wanted)
    return samples[first : first + wanted].copy()  # writable, and the rest is let go


def _by_ffmpeg(content: bytes) -> tuple[npt.NDArray[np.int16] | None, int]:
    """All samples, None where there are very many, and how many there are."""
    try:
        samples, count = ffmpeg.decode(content, SAMPLE_RATE)
    except Unsound as error:
        raise BadSample(f"the audio {error}") from None
    if not count:
        raise BadSample(NO_SAMPLES)
    return samples, count


@contextmanager
def _open(content: bytes) -> Iterator[soundfile.SoundFile]:
    with memory_file(content) as descriptor:
        try:
            with soundfile.SoundFile(descriptor, closefd=False) as file:
                if file.frames >= UNKNOWN_FRAMES:
                    raise BadSample(
                        "the audio's header does not say how long it is (an encoder wrote it into a pipe?);"
                        " encode it to a file again"
                    )
                yield file
        except soundfile.LibsndfileError as error:
            kind = _Unread if error.code in UNKNOWN_FORMATS else BadSample
            raise kind(f"the audio cannot be decoded: {error.error_string}") from None
