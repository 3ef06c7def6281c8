"""What a container says is compared with what is there: all of it is read, or a reason is given."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from data import containers, mpeg
from data.decode import SAMPLE_RATE, BadSample, decode, probe
from data.index import load_sidecar
from data.sources import expand
from tests.making import run_program
from tests.shards import clip, rows, shard, source, words

SECONDS = 2.0
RANDOM = np.random.default_rng(7)
ID3V1 = b"TAG" + bytes(125)
APE = b"APETAGEX" + bytes(24) + RANDOM.bytes(50_000) + b"APETAGEX" + bytes(24)


def noise(seconds: float = SECONDS, rate: int = SAMPLE_RATE, channels: int = 1) -> np.ndarray:
    """(n, channels), the same whenever it is asked for."""
    return np.random.default_rng(1).uniform(-0.4, 0.4, (int(seconds * rate), channels))


def encode(
    form: str = "WAV", waves: np.ndarray | None = None, rate: int = SAMPLE_RATE, **how: object
) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(rate=rate) if waves is None else waves, rate, format=form, **how)
    return file.getvalue()


def put(content: bytes, at: int, number: int, size: int = 4, order: str = "little") -> bytes:
    """Another number at a place of a file."""
    return content[:at] + number.to_bytes(size, order) + content[at + size :]  # type: ignore[arg-type]


def lengths(content: bytes, ending: str) -> tuple[float, float]:
    """Seconds as probed and as decoded."""
    return probe(content, ending).seconds, len(decode(content, ending)) / SAMPLE_RATE


WAV, AIFF, W64, RF64, AU, CAF = map(encode, ("WAV", "AIFF", "W64", "RF64", "AU", "CAF"))
SSND, W64_DATA, CAF_DATA = AIFF.index(b"SSND") + 4, W64.index(b"data\xf3\xac") + 16, CAF.index(b"data") + 4
PIPE = 0xFFFF_FFFF
LIAR = b"LIST" + (1 << 27).to_bytes(4, "little") + b"INFOISFT" + bytes(4)
SIZES = {
    "RIFF with a flipped bit": put(WAV, 4, len(WAV) - 8 + 0x6000_0000),
    "RIFF zero": put(WAV, 4, 0),
    "RIFF half": put(WAV, 4, len(WAV) // 2),
    "data with a flipped bit": put(WAV, 40, 64_000 + 0x6000_0000),
    "data twice": put(WAV, 40, 128_000),
    "data half": put(WAV, 40, 32_000),
    "data zero": put(WAV, 40, 0),
    "both zero, of a recorder that was switched off": put(put(WAV, 40, 0), 4, 0),
    "both as in an empty file": put(put(WAV, 40, 0), 4, 36),
    "both from a pipe": put(put(WAV, 40, PIPE), 4, PIPE),
    "a chunk before the audio": WAV[:36] + LIAR + WAV[36:],
    "an odd chunk without padding": WAV[:36] + b"LIST\5\0\0\0INFOx" + WAV[36:],
    "a chunk behind the audio": put(WAV + b"LIST" + PIPE.to_bytes(4) + bytes(20_000) + b"x", 4, 84_045),
    "BW64": b"BW64" + RF64[4:],
    "RF64, data zero": put(RF64, 28, 0, 8),
    "RF64, data twice": put(RF64, 28, 128_000, 8),
    "W64, whole twice": put(W64, 16, 2 * len(W64), 8),
    "W64, data zero": put(W64, W64_DATA, 0, 8),
    "W64, data twice": put(W64, W64_DATA, 128_024, 8),
    "AIFF, FORM zero": put(AIFF, 4, 0),
    "AIFF, SSND zero": put(AIFF, SSND, 0),
    "AIFF, SSND twice": put(AIFF, SSND, 128_008, order="big"),
    "AU, from a pipe": put(AU, 8, PIPE),
    "AU, zero": put(AU, 8, 0),
    "CAF, from a pipe": put(CAF, CAF_DATA, (1 << 64) - 1, 8),
    "CAF, zero": put(CAF, CAF_DATA, 0, 8),
}  # fmt: skip


@pytest.mark.parametrize("case", SIZES)
def test_all_of_the_audio_is_read_whatever_sizes_the_header_states(case: str) -> None:
    wanted = np.rint(noise()[:, 0] * 32768)
    assert probe(SIZES[case], "wav").seconds == SECONDS
    assert np.abs(decode(SIZES[case], "wav") - wanted).max() <= 1


@pytest.mark.parametrize("form", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF"])
def test_what_is_cut_off_is_refused_in_every_container(form: str) -> None:
    content = encode(form)
    for action in (decode, probe):
        with pytest.raises(BadSample, match=r"cut off: [\d,]+ of [\d,]+ bytes are there"):
            action(content[: len(content) // 2], form.lower())


def test_sizes_that_agree_with_each_other_are_those_of_a_file_that_was_cut_off() -> None:
    twice = put(put(WAV, 40, 128_000), 4, 128_036)
    with pytest.raises(BadSample, match=r"cut off: 64,044 of 128,044 bytes"):
        decode(twice, "wav")
    half = put(put(WAV, 40, 32_000), 4, 32_036)
    with pytest.raises(BadSample, match=r"goes on where it should end.* 32,044 of 64,044 bytes"):
        decode(half, "wav")
    assert lengths(WAV + ID3V1, "wav") == (SECONDS, SECONDS)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_half_an_ogg_is_refused_and_one_that_was_recorded_up_to_some_moment_is_read(subtype: str) -> None:
    content = encode("OGG", noise(8, 48_000), 48_000, subtype=subtype)
    pages = [found.start() for found in re.finditer(b"OggS\\0", content)]
    middle = pages[len(pages) // 2]
    for cut in (content[: middle - 99], content[: middle + 20], content[:middle] + bytes(9999)):
        with pytest.raises(BadSample, match="is cut off: its last page is not all there"):
            probe(cut, "ogg")
    recorded = content[:middle]
    assert 2 < lengths(recorded, "ogg")[1] < 6
    assert lengths(content + ID3V1, "ogg")[1] == 8


def test_an_ogg_with_a_hole_is_a_bad_sample() -> None:
    content = encode("OGG", noise(8, 48_000), 48_000)
    third = len(content) // 3
    with pytest.raises(BadSample, match="bytes are no pages of Ogg"):
        decode(content[:third] + bytes(third) + content[2 * third :], "ogg")


def mp3(seconds: float = SECONDS, rate: int = 44_100, channels: int = 1) -> bytes:
    return encode("MP3", noise(seconds, rate, channels), rate)


ENDS = {
    "WAV": (encode(), encode("WAV", noise(1, 44_100, 2), 44_100)),
    "WAV from a pipe": (put(put(WAV, 40, PIPE), 4, PIPE), encode("WAV", noise(1))),
    "AIFF": (encode("AIFF"), encode("AIFF", noise(1))),
    "AU": (encode("AU"), encode("AU", noise(1))),
    "FLAC": (encode("FLAC"), encode("FLAC", noise(1, 44_100, 2), 44_100)),
    "Ogg": (encode("OGG", noise(rate=44_100), 44_100), encode("OGG", noise(1, 48_000, 2), 48_000)),
    "Opus": (
        encode("OGG", noise(rate=48_000), 48_000, subtype="OPUS"),
        encode("OGG", noise(1, 24_000), 24_000, subtype="OPUS"),
    ),
    "MP3": (mp3(), mp3(1)),
    "MP3 of different rates": (mp3(), mp3(1, 22_050, 2)),
    "MP3 with tags": (mp3() + ID3V1, b"ID3\3\0\0\0\0\2\0" + bytes(256) + mp3(1)),
}


@pytest.mark.parametrize("case", ENDS)
def test_files_end_to_end_are_one_clip(case: str) -> None:
    first, second = ENDS[case]
    whole = decode(first + second, "x")
    assert probe(first + second, "x").seconds == pytest.approx(3.0, abs=0.002)
    assert np.array_equal(whole, np.concatenate([decode(first, "x"), decode(second, "x")]))
    part = decode(first + second, "x", lambda seconds: (1.5, 1.0))
    assert len(part) == pytest.approx(SAMPLE_RATE, abs=2)
    inner = slice(400, 7_600)  # up to where the second one begins
    assert np.corrcoef(part[inner], whole[24_000:][inner])[0, 1] > 0.99


def frames_of(content: bytes) -> bytes:
    """An MP3 without the frame that states its length."""
    first = mpeg._frame(content, 0)
    assert first is not None and mpeg._statement(content, 0, first)
    return content[first.size :]


def varying(first: float, second: float, rate: int = 44_100) -> bytes:
    """An MP3 of variable bit rate, 5 s of each loudness, that does not say how long it is."""
    half = noise(5, rate)
    waves = np.concatenate([half * first, half * second])
    return frames_of(encode("MP3", waves, rate, bitrate_mode="VARIABLE", compression_level=0.1))


def id3(content: bytes) -> bytes:
    size = bytes(len(content) >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x03\x00\x00" + size + content


@pytest.mark.parametrize("rate", [44_100, 22_050, 11_025])
@pytest.mark.parametrize(("first", "second"), [(0.0, 1.0), (1.0, 0.0)])
def test_an_mp3_of_variable_bit_rate_is_read_to_its_end_without_a_stated_length(
    first: float, second: float, rate: int
) -> None:
    content = varying(first, second, rate)
    for held in (content, content + APE, content + APE + ID3V1, b"HTTP/1.0 200 OK\r\n\r\n" + content):
        probed, decoded = lengths(held, "mp3")
        assert probed == pytest.approx(10, abs=0.2) and decoded == pytest.approx(probed, abs=0.001)
    loud = np.abs(decode(content, "mp3").astype(float))
    quarters = [loud[: 4 * SAMPLE_RATE].mean() > 500, loud[6 * SAMPLE_RATE :].mean() > 500]
    assert quarters == [first > 0, second > 0]


BEFORE = {
    "zeros": bytes(1000),
    "many zeros": bytes(10_000),
    "junk": RANDOM.bytes(3000),
    "what a server said": b"HTTP/1.1 200 OK\r\nicy-name: x\r\n\r\n",
    "two tags in UTF-16": id3("\ufeffÿûÿú".encode("utf-16") * 90) * 2,
    "a tag whose size is a lie": b"ID3\3\0\0\0\x7f\x7f\x7f" + b"TIT2",
}


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_what_stands_before_the_first_frame_of_an_mp3_is_passed_over(before: bytes) -> None:
    assert np.array_equal(decode(before + mp3(), "mp3"), decode(mp3(), "mp3"))
    assert probe(before + mp3(), "mp3").seconds == SECONDS


def test_an_mp3_that_states_too_few_frames_is_read_to_its_end() -> None:
    content = mp3()
    at = max(content.find(mark, 0, 200) for mark in mpeg.STATED) + 8
    frames = int.from_bytes(content[at : at + 4], "big")
    probed, decoded = lengths(put(content, at, frames // 2, order="big"), "mp3")
    assert probed == pytest.approx(SECONDS, abs=0.1) == decoded


def test_an_mp3_with_a_hole_is_a_bad_sample() -> None:
    content = varying(1, 1)
    third = len(content) // 3
    for action in (decode, probe):
        with pytest.raises(BadSample, match=r"damaged: .* are no frames of MPEG audio"):
            action(content[:third] + bytes(third) + content[2 * third :], "mp3")


PLAIN = [
    ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"), ("CAF", "PCM_16"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "subtype"), PLAIN)
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_ordinary_files_are_decoded_as_they_always_were(form: str, subtype: str, rate: int) -> None:
    """By libsndfile from the bytes as they are, mixed, resampled and rounded: bit for bit."""
    content = encode(form, noise(rate=rate, channels=2), rate, subtype=subtype)
    (held,) = containers.files(content, False) or []
    assert held is content, "and without a copy"
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        waves = file.read(1 << 20, dtype="float32")
    mono = (waves[:, 0] + waves[:, 1]) * np.float32(0.5)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    assert np.array_equal(decode(content, "x"), np.clip(np.rint(mono * 32768), -32768, 32767))


NO_AUDIO = {
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1048576\n",
    "a web page (Sign in)": b"<!doctype html><title>Sign in</title>" + b"<p>please</p>" * 50,
    "a zip archive": b"PK\3\4" + bytes(26) + b"a.wav" + WAV,
    "a Parquet file": b"PAR1" + bytes(3000) + b"PAR1",
    "JSON": b'{"error": "denied"}',
    "text (not found)": b"not found",
    "nothing but zero bytes": bytes(9000),
    "what macOS keeps beside a file": bytes.fromhex("00051607") + bytes(4) + b"Mac OS X        " + bytes(60),
}


@pytest.mark.parametrize("what", NO_AUDIO)
@pytest.mark.parametrize("ending", ["wav", "mp3", "m4a"])
def test_what_is_no_audio_says_what_it_is(what: str, ending: str) -> None:
    for action in (decode, probe):
        with pytest.raises(BadSample) as refused:
            action(NO_AUDIO[what], ending)
        assert str(refused.value).startswith(f"the audio is {what}")


@pytest.mark.parametrize("content", [WAV[:4], WAV[:12], b"fLaC", b"OggS"])
def test_a_beginning_of_audio_is_not_called_text(content: bytes) -> None:
    with pytest.raises(BadSample, match="the audio cannot be decoded"):
        decode(content, "wav")


@pytest.mark.parametrize("ending", ["wav", "mp3", "opus", "m4a", "webm"])
@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_the_content_decides_what_reads_it(form: str, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert lengths(encode(form), ending) == (SECONDS, SECONDS)


@pytest.fixture(scope="module")
def by_ffmpeg(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """Makes an audio file of noise: ending, codec, seconds."""
    if (program := shutil.which("ffmpeg")) is None:
        assert not os.environ.get("CI"), "CI must have ffmpeg on its PATH"
        pytest.skip("there is no ffmpeg on the PATH")

    def make(ending: str, codec: str, seconds: float = SECONDS, *options: str) -> bytes:
        folder = tmp_path_factory.mktemp("made")
        (folder / "a.wav").write_bytes(encode("WAV", noise(seconds)))
        command = [program, "-v", "error", "-i", folder / "a.wav", "-c:a", codec, *options]
        subprocess.run([*command, folder / f"b.{ending}"], check=True)
        return (folder / f"b.{ending}").read_bytes()

    return make


FFMPEGS = [
    ("m4a", "aac"), ("webm", "libopus"), ("aac", "aac"), ("wma", "wmav2"), ("mka", "libvorbis"),
    ("ts", "aac"), ("wav", "wmav2"), ("caf", "alac"), ("ogg", "flac"), ("wv", "wavpack"), ("avi", "ac3"),
]  # fmt: skip


@pytest.mark.parametrize(("ending", "codec"), FFMPEGS)
def test_what_only_ffmpeg_reads_goes_there_under_any_name(
    by_ffmpeg: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, ending: str, codec: str
) -> None:
    content = by_ffmpeg(ending, codec)
    probed, decoded = lengths(content, "mp3")
    assert probed == decoded == pytest.approx(SECONDS, abs=0.15)
    monkeypatch.setenv("PATH", "")
    for action in (decode, probe):
        with pytest.raises(BadSample, match=r"^the audio needs FFmpeg, and there is no"):
            action(content, "wav")


def test_half_of_what_ffmpeg_reads_is_refused(by_ffmpeg: Callable[..., bytes]) -> None:
    streamed = by_ffmpeg("m4a", "aac", SECONDS, "-movflags", "+faststart")
    for content in (streamed, by_ffmpeg("webm", "libopus")):
        with pytest.raises(BadSample, match=r"cut off: [\d,]+ of [\d,]+ bytes are there"):
            decode(content[: len(content) // 2], "m4a")
    with pytest.raises(BadSample, match="several MP4 files end to end"):
        probe(streamed + streamed, "m4a")


def test_a_stretch_of_what_ffmpeg_reads_is_that_of_the_whole_and_held_alone(
    by_ffmpeg: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = by_ffmpeg("m4a", "aac", 12.0)
    whole = decode(content, "m4a")
    for held in (600, 3):  # seconds, beyond which it is decoded again
        monkeypatch.setattr("data.ffmpeg.HELD_SECONDS", held)
        monkeypatch.setattr("data.ffmpeg.PART", 30_000)
        found: list[float] = []

        def fit(seconds: float, found: list[float] = found) -> tuple[float, float]:
            found.append(seconds)
            return 5.5, 2.25

        assert np.array_equal(decode(content, "m4a", fit), whole[88_000:124_000])
        assert found == [len(whole) / SAMPLE_RATE] and np.array_equal(decode(content, "m4a"), whole)


def test_ffmpeg_that_is_missing_costs_its_samples_and_the_commands_count_them(
    by_ffmpeg: Callable[..., bytes], tmp_path: Path
) -> None:
    folder, content = tmp_path / "clips", by_ffmpeg("m4a", "aac")
    folder.mkdir()
    (folder / "a.wav").write_bytes(WAV)
    for name in ("b.m4a", "c.mp3"):
        (folder / name).write_bytes(content)
    (folder / "clips.csv").write_text("file,caption\na.wav,A\nb.m4a,B\nc.mp3,C\n", encoding="utf-8")
    without = {**os.environ, "PATH": ""}
    packed = run_program("tools.pack", folder / "clips.csv", tmp_path / "out", env=without)
    assert packed.returncode == 0 and "line 3: b.m4a: the audio needs FFmpeg" in packed.stdout
    assert "2 of the rejected rows need FFmpeg, and would be won by installing it" in packed.stdout

    path = shard(tmp_path / "a.tar", [("b.m4a", content), ("b.json", words()), *clip("a")])
    index = ["tools.index", path, "--index-dir", tmp_path / "index"]
    indexed = run_program(*index, env=without)
    assert indexed.returncode == 0 and "a.tar: b: the audio needs FFmpeg" in indexed.stdout
    assert "1 of these problems needs FFmpeg, and would be won by installing it" in indexed.stdout
    assert "indexed anew" not in run_program(*index, env=without).stdout
    again = run_program(*index)
    assert "needed FFmpeg, which is here now; it is indexed anew" in again.stdout
    (known,) = expand(source(path))
    sidecar = load_sidecar(known, tmp_path / "index")
    assert sidecar is not None and sidecar.table["problem"].to_pylist() == ["", ""]
    assert "indexed anew" not in run_program(*index).stdout


def test_an_index_names_the_sample_that_needs_ffmpeg(
    by_ffmpeg: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = shard(tmp_path / "a.tar", [("b.mp3", by_ffmpeg("m4a", "aac")), ("b.json", words()), *clip("a")])
    monkeypatch.setenv("PATH", "")
    problems = {key: row["problem"] for key, row in rows(path).items()}
    assert problems["a"] == "" and problems["b"].startswith("the audio needs FFmpeg")
