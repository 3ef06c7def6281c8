from __future__ import annotations

import io
import os
import shutil
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data.decode import SAMPLE_RATE, BadSample, decode, in_words, probe
from tools import caption

FORMATS = {
    "wav": "PCM_16",
    "flac": "PCM_16",
    "ogg": "VORBIS",
    "mp3": "MPEG_LAYER_III",
    "opus": "OPUS",
    "aiff": "PCM_16",
    "au": "PCM_16",
    "w64": "PCM_16",
}
LOSSY = {"ogg", "mp3", "opus"}
CASES = [
    (ending, rate, channels)
    for ending in FORMATS
    for rate in (8_000, 16_000, 44_100, 48_000)
    for channels in (1, 2, 6)
    if (ending, rate) != ("opus", 44_100) and (ending, channels) != ("mp3", 6)  # there are no such files
]


def duration(content: bytes, ending: str) -> float:
    return probe(content, ending).seconds


def sine(rate: int, seconds: float = 1.0) -> np.ndarray:
    """440 Hz at half of full scale: (n,)."""
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


def encode(wave: np.ndarray, rate: int, ending: str = "wav", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    container = "OGG" if ending == "opus" else ending
    soundfile.write(file, wave, rate, format=container, subtype=subtype or FORMATS[ending])
    return file.getvalue()


def streamed_flac(frames: int, whole: bytes | None = None) -> bytes:
    """A FLAC, of 1 s, whose header states another length; 0 is what an encoder writes into a pipe, where it
    cannot go back."""
    content = bytearray(whole or encode(sine(SAMPLE_RATE), SAMPLE_RATE, "flac"))
    content[21] = content[21] & 0xF0 | frames >> 32
    content[22:26] = (frames & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(("ending", "rate", "channels"), CASES)
def test_every_format_becomes_16_khz_mono(ending: str, rate: int, channels: int) -> None:
    content = encode(np.repeat(sine(rate)[:, None], channels, 1), rate, ending)
    decoded, wanted = decode(content, ending), sine(SAMPLE_RATE)
    assert decoded.dtype == np.int16 and decoded.shape == wanted.shape
    assert duration(content, ending) == pytest.approx(1.0, abs=1 / SAMPLE_RATE)
    correlation = np.corrcoef(decoded, wanted)[0, 1]
    assert correlation > (0.99 if ending in LOSSY else 0.99999), "another wave, or shifted"
    loudness = np.std(decoded / 32768) / np.std(wanted)
    tolerance = 0.02 if ending in LOSSY else 1e-3
    if ending in LOSSY and channels == 6:
        tolerance = 0.2  # codecs cut the sixth channel, the bass
    assert loudness == pytest.approx(1, abs=tolerance)


def test_channels_are_averaged() -> None:
    for channels in (2, 3, 6):
        waves = np.random.default_rng(channels).uniform(-0.5, 0.5, (1000, channels))
        decoded = decode(encode(waves, SAMPLE_RATE), "wav")
        assert np.abs(decoded / 32768 - waves.mean(1)).max() < 2 / 32768


@pytest.mark.parametrize("ending", ["wav", "flac", "aiff"])
def test_16_bit_16_khz_mono_comes_back_bit_for_bit(ending: str) -> None:
    wave = np.random.default_rng(0).integers(-32768, 32768, 50_000).astype(np.int16)
    wave[:3] = -32768, 32767, 0
    assert np.array_equal(decode(encode(wave, SAMPLE_RATE, ending), ending), wave)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_every_depth_of_wav_is_read_alike(subtype: str) -> None:
    decoded = decode(encode(sine(SAMPLE_RATE), SAMPLE_RATE, subtype=subtype), "wav")
    assert np.abs(decoded / 32768 - sine(SAMPLE_RATE)).max() < (
        0.03 if subtype in ("PCM_U8", "ULAW") else 1 / 32768
    )


def test_what_is_louder_than_full_scale_is_clipped_and_never_wraps() -> None:
    decoded = decode(encode(6 * sine(SAMPLE_RATE), SAMPLE_RATE, subtype="FLOAT"), "wav")
    assert (decoded.min(), decoded.max()) == (-32768, 32767)
    assert not (np.sign(decoded[1:-1]) * np.sign(sine(SAMPLE_RATE)[1:-1]) < 0).any()


@pytest.mark.parametrize("samples", [3, 159, 160])
@pytest.mark.parametrize("rate", [8_000, 16_000, 48_000])
def test_very_short_clips_are_decoded(samples: int, rate: int) -> None:
    decoded = decode(encode(np.full(samples, 0.5), rate), "wav")
    assert abs(len(decoded) - samples * SAMPLE_RATE / rate) <= 1 and len(decoded)


@pytest.mark.parametrize("ending", FORMATS)
def test_empty_content_is_a_bad_sample(ending: str) -> None:
    for action in (decode, duration):
        with pytest.raises(BadSample, match=r"the audio is empty \(0 bytes\)"):
            action(b"", ending)


@pytest.mark.parametrize("ending", ["wav", "aiff", "opus"])
def test_a_clip_of_no_samples_is_a_bad_sample(ending: str) -> None:
    for action in (decode, duration):
        with pytest.raises(BadSample, match=r"no samples \(0 s\)|cannot be decoded"):
            action(encode(np.zeros(0), SAMPLE_RATE, ending), ending)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    "content", [b"<html>404 Not Found</html>", bytes(1000), None], ids=["page", "zeros", "cut"]
)
def test_what_is_no_audio_is_a_bad_sample(ending: str, content: bytes | None) -> None:
    for action in (decode, duration):
        with pytest.raises(BadSample, match="the audio"):
            action(content or encode(sine(SAMPLE_RATE), SAMPLE_RATE, ending)[:20], ending)


def test_values_that_are_not_finite_are_a_bad_sample() -> None:
    wave = sine(SAMPLE_RATE)
    wave[100] = np.nan
    for rate in (16_000, 44_100):
        with pytest.raises(BadSample, match="not finite"):
            decode(encode(wave, rate, subtype="FLOAT"), "wav")


@pytest.mark.parametrize(("loudness", "rate"), [(3000, 16_000), (3000, 44_100), (20, 16_000)])
def test_integers_that_were_written_as_floats_are_a_bad_sample(loudness: int, rate: int) -> None:
    waves = np.rint(np.random.default_rng(0).standard_normal(rate) * loudness)
    file = io.BytesIO()
    soundfile.write(file, waves.astype(np.float32), rate, format="WAV", subtype="FLOAT")
    with pytest.raises(BadSample, match=r"far beyond full scale.*integers written as floats"):
        decode(file.getvalue(), "wav")


def test_a_flac_whose_header_cannot_be_so_is_told() -> None:
    for read in (decode, duration):
        with pytest.raises(BadSample, match="does not say how long it is"):
            read(streamed_flac(1 << 33), "flac")


@pytest.mark.parametrize("frames", [0, 1, SAMPLE_RATE // 2])
def test_a_flac_that_states_less_than_there_is_is_read_to_its_end(frames: int) -> None:
    for seconds in (1, 200):  # frames of two sizes of number
        content = encode(sine(SAMPLE_RATE, seconds), SAMPLE_RATE, "flac")
        stated = streamed_flac(frames, content)
        assert duration(stated, "flac") == seconds
        assert np.array_equal(decode(stated, "flac"), decode(content, "flac"))


def test_a_wav_that_an_encoder_wrote_into_a_pipe_is_read() -> None:
    content = bytearray(encode(sine(SAMPLE_RATE), SAMPLE_RATE))
    content[4:8] = content[40:44] = b"\xff" * 4
    assert len(decode(bytes(content), "wav")) == SAMPLE_RATE and duration(bytes(content), "wav") == 1.0


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "opus"])
@settings(max_examples=60, derandomize=True, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), garbage=st.binary(min_size=1, max_size=12), cut=st.booleans())
def test_damaged_content_never_ends_a_run(ending: str, place: float, garbage: bytes, cut: bool) -> None:
    content = encode(sine(SAMPLE_RATE), SAMPLE_RATE, ending)
    at = int(place**3 * len(content))  # mostly in headers
    check_harmless(content[:at] + garbage + (b"" if cut else content[at + len(garbage) :]), ending)


@pytest.mark.parametrize("frames", [1, 1 << 32, (1 << 36) - 1])
def test_a_length_that_is_not_so_never_ends_a_run(frames: int) -> None:
    check_harmless(streamed_flac(frames), "flac")


def check_harmless(content: bytes, ending: str) -> None:
    for action in (decode, duration):
        try:
            assert np.size(action(content, ending))
        except BadSample as error:
            assert str(error).startswith("the audio")


def test_m4a_is_decoded_by_ffmpeg(tmp_path: Path) -> None:
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        assert not os.environ.get("CI"), "CI must have ffmpeg on its PATH"
        pytest.skip("there is no ffmpeg on the PATH")
    (tmp_path / "a.wav").write_bytes(encode(np.repeat(sine(44_100)[:, None], 2, 1), 44_100))
    subprocess.run(
        [ffmpeg, "-v", "error", "-i", tmp_path / "a.wav", "-c:a", "aac", tmp_path / "a.m4a"], check=True
    )
    content = (tmp_path / "a.m4a").read_bytes()
    decoded = decode(content, "m4a")
    assert decoded.dtype == np.int16 and len(decoded) == pytest.approx(SAMPLE_RATE, abs=2048)
    assert duration(content, "m4a") == len(decoded) / SAMPLE_RATE
    middle = decoded[4000:12000] / 32768
    assert np.abs(np.fft.rfft(middle)).argmax() * SAMPLE_RATE / len(middle) == 440
    assert np.std(middle) == pytest.approx(0.5 / np.sqrt(2), rel=0.03), (
        "mono must be the mean of the channels"
    )
    with pytest.raises(BadSample, match="the audio cannot be decoded"):
        decode(content[:20] + bytes(100), "m4a")
    with pytest.raises(BadSample, match="cut off"):
        decode(content[: len(content) // 2], "m4a")


def test_an_ffmpeg_that_never_ends_is_an_error_of_the_sample(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not (ffmpeg := shutil.which("ffmpeg")):
        pytest.skip("there is no ffmpeg on the PATH")
    endless = tmp_path / "ffmpeg"
    endless.write_text(f'#!/bin/sh\nexec {ffmpeg} -stream_loop -1 "$@"\n', encoding="utf-8")
    endless.chmod(0o755)
    (tmp_path / "a.wav").write_bytes(encode(sine(48_000, 5), 48_000))
    subprocess.run([ffmpeg, "-v", "error", "-i", tmp_path / "a.wav", tmp_path / "a.m4a"], check=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("data.ffmpeg.CPU_SECONDS", 1)
    with pytest.raises(BadSample, match="stopped after 1 s"):
        decode((tmp_path / "a.m4a").read_bytes(), "m4a")


@pytest.mark.parametrize("ending", ["m4a", "mp4", "aac", "webm", "16k.m4a"])
def test_without_ffmpeg_the_way_to_install_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for action in (decode, duration):
        with pytest.raises(BadSample, match=r"the audio needs FFmpeg.*apt-get install ffmpeg"):
            action(b"\0\0\0 ftypM4A ", ending)


def seek_less(seconds: float = 10.0) -> bytes:
    """A WAV in GSM 6.10, as telephone prompts are: libsndfile reads it from the beginning only."""
    return encode(sine(8_000, seconds), 8_000, subtype="GSM610")


def test_a_wav_that_cannot_be_seeked_in_is_read_and_cropped() -> None:
    assert len(decode(seek_less(), "wav")) == pytest.approx(10 * SAMPLE_RATE, abs=640)
    whole, part = decode(seek_less(), "wav"), decode(seek_less(), "wav", lambda seconds: (3.0, 2.0))
    assert len(part) == 2 * SAMPLE_RATE
    assert np.corrcoef(part[400:-400], whole[3 * SAMPLE_RATE + 400 : 5 * SAMPLE_RATE - 400])[0, 1] > 0.999


def mp3(seconds: float, *, tag: bytes = b"", stated: bool = True) -> bytes:
    """An MP3 of constant bit rate, behind an ID3 tag; without its first frame it does not state its
    length."""
    file = io.BytesIO()
    soundfile.write(
        file, sine(44_100, seconds), 44_100, format="MP3", bitrate_mode="CONSTANT", compression_level=0.5
    )
    content = file.getvalue()
    content = content if stated else content[content.index(content[:2], 10) :]
    size = bytes(len(tag) >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x03\x00\x00" + size + tag + content if tag else content


@pytest.mark.parametrize(
    "tag", [b"\0" * 500_000, b"COMM more Info at example.org, Xing" + bytes(100)], ids=["cover art", "words"]
)
@pytest.mark.parametrize("stated", [True, False])
def test_an_id3_tag_is_not_taken_for_audio_or_for_a_stated_length(tag: bytes, stated: bool) -> None:
    lengths: list[float] = []
    decoded = decode(mp3(20, tag=tag, stated=stated), "mp3", lengths.append)
    assert len(decoded) == pytest.approx(20 * SAMPLE_RATE, rel=0.02) and lengths == [
        pytest.approx(20, rel=0.02)
    ]


@pytest.mark.parametrize(
    ("seconds", "limit", "said"),
    [
        (10_800, 30, "10800.0"),
        (30.0000625, 30, "30.0001"),
        (4.04, 4, "4.04"),
        (np.float32(1.23), 1.2, "1.23"),
    ],
)
def test_a_length_that_exceeds_a_limit_is_never_said_to_equal_it(
    seconds: float, limit: float, said: str
) -> None:
    assert in_words(seconds, limit) == said


def test_caption_decodes_no_more_than_the_window_and_says_how_long_the_file_is(tmp_path: Path) -> None:
    with soundfile.SoundFile(tmp_path / "hour.flac", "w", 44_100, 2) as file:
        for _ in range(60):
            file.write(np.zeros((60 * 44_100, 2), np.int16))
    tracemalloc.start()
    clip = caption._read(tmp_path / "hour.flac", 30.0)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20, "the file in whole would be 1.3 GB"
    tracemalloc.stop()
    assert clip.seconds == 3600 and len(clip.waveform) == 30 * SAMPLE_RATE
    (tmp_path / "short.wav").write_bytes(encode(sine(SAMPLE_RATE), SAMPLE_RATE))
    clip = caption._read(tmp_path / "short.wav", 30.0)
    assert clip.seconds == 1 and len(clip.waveform) == SAMPLE_RATE


@pytest.mark.parametrize("start", [0.0, 4.0, 7.0])
def test_a_crop_that_is_not_all_there_is_a_bad_sample(start: float) -> None:
    whole = mp3(10)
    with pytest.raises(BadSample, match="cut off"):
        decode(whole[: len(whole) // 2], "mp3", lambda seconds: (start, 3.0 if start else 9.0))
