"""Audio files in memory -> 16 kHz mono int16, in threads: libsndfile and soxr release the GIL."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from data import containers
from data.kinds import what_it_is
from data.mpeg import COMPLETE, Unsound

SAMPLE_RATE = 16_000  # Hz
FFMPEG_ONLY = {"m4a", "mp4", "aac", "webm", "wma", "mka"}
"""Endings of formats that libsndfile does not read."""
FFMPEG_SECONDS = 100
"""CPU time after which FFmpeg is taken to never end; it decodes 25 h of AAC in it."""
READ_FRAMES = 1 << 20
LAST_FRAMES = 256
FFMPEG_HELD = 600 * SAMPLE_RATE
"""Samples that are kept while FFmpeg decodes: of what is longer, the wanted stretch is decoded again."""
NEEDS_FFMPEG = "the audio needs FFmpeg"
"""What the reason begins with where there is none."""
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
    | FFMPEG_ONLY
)
"""Endings of tar members that are taken for audio."""


class BadSample(Exception):
    """The content of a sample cannot be used; the message says why."""


class NeedsFfmpeg(BadSample):
    """Only FFmpeg reads this sample, and there is none."""

    def __init__(self) -> None:
        super().__init__(
            f"{NEEDS_FFMPEG}, and there is no `ffmpeg` on this machine's PATH: install it (apt-get install"
            " ffmpeg, or conda install ffmpeg), or convert the clips to FLAC"
        )


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
    int16. Raises BadSample for content that is not sound audio of at least one sample, NeedsFfmpeg where only
    FFmpeg could say.
    """
    files = _files(content, ending)
    if files is None:
        return _ffmpeg(content, fit)
    try:
        return _sndfile(files[0], fit) if len(files) == 1 else _chain(files, fit)
    except _Unread:
        if not _is_ffmpegs(files):
            raise
        return _ffmpeg(content, fit)


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
        return AudioInfo(_ffmpeg_length(content), 0, 0)
    return AudioInfo(sum(info.seconds for info in infos), infos[0].rate, infos[0].channels)


def has_ffmpeg() -> bool:
    """Whether there is an FFmpeg on this machine's PATH."""
    return shutil.which("ffmpeg") is not None


def needs_ffmpeg(reason: str) -> bool:
    """Whether this is the reason of NeedsFfmpeg."""
    return reason.startswith(NEEDS_FFMPEG)


def ffmpeg_would_win(count: int) -> str:
    """For a summary, after "N of what": that they would be won by installing FFmpeg."""
    verb = "needs" if count == 1 else "need"
    return f"{verb} FFmpeg, and would be won by installing it (apt-get install ffmpeg)"


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
        return containers.files(content, ending.rsplit(".", 1)[-1] in FFMPEG_ONLY)
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


def _ffmpeg(content: bytes, fit: Fit) -> npt.NDArray[np.int16]:
    """The stretch that `fit` chooses, by FFmpeg. How long the audio is, it says by decoding it only."""
    held: list[bytes] = []
    count = 0
    for part in _ffmpeg_parts(content):
        count += len(part) // 2
        held = [*held, part] if count <= FFMPEG_HELD else []
    if not count:
        raise BadSample(NO_SAMPLES)
    first, wanted = _frames(fit(count / SAMPLE_RATE), SAMPLE_RATE)
    if count > FFMPEG_HELD:
        held, first = _ffmpeg_stretch(content, first, wanted), 0
    samples = np.frombuffer(b"".join(held), np.int16)
    return samples[first : first + wanted].copy()  # writable, and the rest is let go


def _ffmpeg_stretch(content: bytes, first: int, wanted: int) -> list[bytes]:
    """Samples [first, first + wanted) in parts: decoded from the beginning, as a leap would not be exact."""
    held, at, end = [], 0, 2 * (first + wanted)
    with closing(_ffmpeg_parts(content)) as parts:
        for part in parts:
            held.append(part[max(0, 2 * first - at) : max(0, end - at)])
            at += len(part)
            if at >= end:
                break
    return held


def _ffmpeg_length(content: bytes) -> float:
    """Seconds, by decoding."""
    count = sum(len(part) // 2 for part in _ffmpeg_parts(content))
    if not count:
        raise BadSample(NO_SAMPLES)
    return count / SAMPLE_RATE


def _ffmpeg_parts(content: bytes) -> Generator[bytes]:
    """What FFmpeg makes of a file: int16 at 16 kHz, mono, in parts of whole samples. Raises BadSample."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise NeedsFfmpeg
    with _memory_file(content) as descriptor, tempfile.TemporaryFile() as errors:
        command = [program, "-nostdin", "-v", "error", "-timelimit", str(FFMPEG_SECONDS)]
        command += ["-i", (name := f"/proc/self/fd/{descriptor}")]
        command += ["-vn", "-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "s16le", "-"]
        # As floats FFmpeg would not normalise the mix to mono.
        with subprocess.Popen(
            command, pass_fds=[descriptor], stdout=subprocess.PIPE, stderr=errors
        ) as process:
            assert process.stdout is not None
            try:
                while part := process.stdout.read(READ_FRAMES):
                    yield part
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()
            said = said or f"FFmpeg ended with {process.returncode} (it is stopped after {FFMPEG_SECONDS} s)"
            raise BadSample(f"the audio cannot be decoded: {said.splitlines()[-1].removeprefix(f'{name}: ')}")


@contextmanager
def _open(content: bytes) -> Iterator[soundfile.SoundFile]:
    with _memory_file(content) as descriptor:
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
