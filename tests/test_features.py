from __future__ import annotations

from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperTokenizerFast

from data.batch import Batch, Sample, Segments, collate
from data.captions import IGNORED, CaptionEncoder, Tokens, find_captions, prefix_tokens
from data.decode import SAMPLE_RATE, BadSample, Skipped, decode
from data.features import WINDOW, _of_clips, log_mel, mel_filters
from data.windows import HOP
from tests.making import caption_of

LENGTHS = [1, 150, 200, 201, SAMPLE_RATE // 2, 10 * SAMPLE_RATE, 30 * SAMPLE_RATE - 160, 30 * SAMPLE_RATE]
mels_of_whispers = pytest.mark.parametrize("mels", [80, 128])


@cache
def extractor(mels: int, seconds: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds)


def reference(clips: list[np.ndarray], mels: int, seconds: int = 30) -> np.ndarray:
    """What stock inference feeds the model, from the same int16."""
    return extractor(mels, seconds)(
        [clip / np.float32(32768) for clip in clips], sampling_rate=SAMPLE_RATE, return_tensors="np"
    )["input_features"]


def packed(clips: list[np.ndarray], frames: int) -> Batch:
    """Clips end to end; frames: that are wanted of each, 0 for as many as it has."""
    samples = [
        Sample(clip, Tokens([0], [0]), "", 0, "", frames or 2 * -(-len(clip) // 320)) for clip in clips
    ]
    return collate(samples)


def ours(clips: list[np.ndarray], mels: int, window: int = 3000) -> np.ndarray:
    """What training feeds the model, each padded to the whole window."""
    batch = packed(clips, window)
    features = log_mel(batch.waveforms, batch.sound, batch.audio, mels, window)
    return features.unflatten(1, (len(clips), window)).transpose(0, 1).numpy()


def on_device(clips: list[np.ndarray], mels: int, frames: int = 3000, window: int = 3000) -> torch.Tensor:
    """The branch of log_mel for accelerators: all clips at once. frames: as of `packed`."""
    batch = packed(clips, frames)
    seeing = [min(window, -(-(len(clip) + WINDOW // 2) // HOP)) for clip in clips]
    wanted = Segments.of([2 * positions for positions in batch.audio.lengths])
    return _of_clips(batch.waveforms, batch.sound, Segments.of(seeing), wanted, mels, window)


def by_clip(features: torch.Tensor, window: int = 3000) -> np.ndarray:
    """(mels, F) of whole windows -> (B, mels, window)."""
    return features.unflatten(1, (-1, window)).transpose(0, 1).numpy()


def noise(length: int, seed: int = 0) -> np.ndarray:
    """A tone in noise that swells, so that clips have loud and silent parts."""
    time = np.arange(length) / SAMPLE_RATE
    wave = 0.3 * np.sin(2 * np.pi * 300 * time) + np.random.default_rng(seed).normal(0, 0.1, length)
    return (np.clip(wave * np.sin(time) ** 2 + 1e-4, -1, 1) * 32767).astype(np.int16)


def assert_equal(features: np.ndarray, wanted: np.ndarray) -> None:
    assert features.dtype == np.float32 and features.shape == wanted.shape
    assert np.abs(features - wanted).max() <= 1e-5


@mels_of_whispers
def test_features_are_those_of_stock_whisper_at_every_length(mels: int) -> None:
    clips = [noise(length, seed) for seed, length in enumerate(LENGTHS)] + [
        np.zeros(SAMPLE_RATE, np.int16),
        np.full(SAMPLE_RATE, -32768, np.int16),
    ]
    wanted = reference(clips, mels)
    assert_equal(ours(clips, mels), wanted)
    assert_equal(by_clip(on_device(clips, mels)), wanted)


@mels_of_whispers
@settings(max_examples=15, derandomize=True, deadline=None)
@given(lengths=st.lists(st.integers(1, 4 * SAMPLE_RATE), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_features_of_a_4_s_window(mels: int, lengths: list[int], seed: int) -> None:
    clips = [noise(length, seed) for length in lengths]
    wanted = reference(clips, mels, seconds=4)
    assert wanted.shape[2] == 400
    assert_equal(ours(clips, mels, 400), wanted)
    assert_equal(by_clip(on_device(clips, mels, 400, 400), 400), wanted)


def test_features_do_not_depend_on_the_batch() -> None:
    clips = [noise(length, seed) for seed, length in enumerate(LENGTHS[:6])]
    together = ours(clips, 80)
    for clip, row in zip(clips, together, strict=True):
        assert np.array_equal(ours([clip], 80)[0], row)


@mels_of_whispers
def test_features_of_clips_at_their_own_lengths_are_the_first_of_those_of_stock_whisper(mels: int) -> None:
    click = noise(SAMPLE_RATE)
    click[-20:] = 32767  # the loudest of all, seen best by a frame behind the clip: it sets the floor
    clips = [noise(length, seed) for seed, length in enumerate(LENGTHS)] + [click]
    batch = packed(clips, 0)
    features = log_mel(batch.waveforms, batch.sound, batch.audio, mels, 3000)
    at_once = on_device(clips, mels, 0)
    first = 0
    for clip, wanted in zip(clips, reference(clips, mels), strict=True):
        frames = 2 * -(-len(clip) // 320)
        assert_equal(features[:, first : first + frames].numpy(), wanted[:, :frames])
        assert_equal(at_once[:, first : first + frames].numpy(), wanted[:, :frames])
        first += frames
    assert first == features.shape[1]


@mels_of_whispers
@pytest.mark.parametrize("kind", ["sounds/*.ogg", "speech/*.wav", "music/*.flac"])
def test_features_of_real_clips(real_clips: Path, kind: str, mels: int) -> None:
    files = list(islice(sorted(real_clips.glob(kind)), 0, None, 40))
    assert files
    clips = [decode(file.read_bytes(), file.suffix.lstrip("."))[: 30 * SAMPLE_RATE] for file in files]
    assert all(np.abs(clip).max() > 100 for clip in clips)
    wanted = reference(clips, mels)
    assert_equal(ours(clips, mels), wanted)
    assert_equal(by_clip(on_device(clips, mels)), wanted)


@mels_of_whispers
def test_the_mel_filters_are_those_of_the_extractor(mels: int) -> None:
    assert np.abs(mel_filters(mels) - extractor(mels, 30).mel_filters).max() < 1e-12


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> WhisperTokenizerFast:
    return WhisperTokenizerFast.from_pretrained(model)


@pytest.fixture(scope="module")
def prefix(model: Path, tokenizer: WhisperTokenizerFast) -> list[int]:
    return prefix_tokens(tokenizer.backend_tokenizer, GenerationConfig.from_pretrained(model).to_dict())


def test_the_prefix_is_what_generation_starts_from(
    tokenizer: WhisperTokenizerFast, prefix: list[int]
) -> None:
    assert tokenizer.convert_ids_to_tokens(prefix) == [
        "<|startoftranscript|>",
        "<|en|>",
        "<|transcribe|>",
        "<|notimestamps|>",
    ]
    english = GenerationConfig(decoder_start_token_id=prefix[0], is_multilingual=False)
    assert tokenizer.convert_ids_to_tokens(prefix_tokens(tokenizer.backend_tokenizer, english.to_dict())) == [
        "<|startoftranscript|>",
        "<|notimestamps|>",
    ]


@pytest.mark.parametrize("style", [None, "In the style of AudioCaps."])
@pytest.mark.parametrize("caption", [caption_of(3), caption_of(4), "漢 🎵", "x"])
def test_labels_are_the_inputs_shifted_and_only_the_caption_is_learnt(
    tokenizer: WhisperTokenizerFast, prefix: list[int], caption: str, style: str | None
) -> None:
    encoder = CaptionEncoder(
        tokenizer.backend_tokenizer, prefix, positions=64, long_caption="skip", styles=[style]
    )
    tokens = encoder.encode(caption, style)
    prompt = tokenizer.get_prompt_ids(style).tolist() if style else []
    assert tokens.input_ids[: len(prompt) + len(prefix)] == prompt + prefix
    for next_input, label in zip(tokens.input_ids[1:], tokens.labels[:-1], strict=True):
        assert label in (IGNORED, next_input)
    begin = len(prompt) + len(prefix) - 1
    assert tokens.labels[:begin] == [IGNORED] * begin
    learnt = tokens.labels[begin:]
    assert tokenizer.decode(learnt[:-1]) == caption and learnt[-1] == tokenizer.eos_token_id


def test_a_caption_teaches_what_transformers_would_teach(
    tokenizer: WhisperTokenizerFast, prefix: list[int]
) -> None:
    """The same pairs of input and label as Hugging Face's own recipe: labels from the tokenizer, shifted
    right by the model."""
    tokens = CaptionEncoder(tokenizer.backend_tokenizer, prefix, positions=64, long_caption="skip").encode(
        caption_of(5)
    )
    words = tokenizer(caption_of(5), add_special_tokens=False)["input_ids"]
    labels = [*prefix, *words, tokenizer.eos_token_id]
    assert tokens.input_ids == labels[:-1]
    assert tokens.labels == [IGNORED] * (len(prefix) - 1) + labels[len(prefix) :]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(words=st.integers(0, 40), positions=st.integers(30, 64), styled=st.booleans())
def test_a_caption_fits_the_positions_with_its_prompt(
    tokenizer: WhisperTokenizerFast, prefix: list[int], words: int, positions: int, styled: bool
) -> None:
    caption, style = "beep" + " beep" * words, "AudioCaps" if styled else None
    encoders = {
        long: CaptionEncoder(
            tokenizer.backend_tokenizer, prefix, positions=positions, long_caption=long, styles=["AudioCaps"]
        )
        for long in ("truncate", "skip")
    }
    roomy = CaptionEncoder(
        tokenizer.backend_tokenizer, prefix, positions=448, long_caption="skip", styles=["AudioCaps"]
    )
    whole = roomy.encode(caption, style)
    cut = encoders["truncate"].encode(caption, style)
    assert len(cut.input_ids) == len(cut.labels) == min(len(whole.input_ids), positions)
    assert cut.input_ids == whole.input_ids[:positions] and cut.labels[-1] == tokenizer.eos_token_id
    if len(whole.input_ids) <= positions:
        assert cut == whole == encoders["skip"].encode(caption, style)
    else:
        with pytest.raises(Skipped, match=r"the caption has \d+ tokens, there is room for \d+"):
            encoders["skip"].encode(caption, style)


def test_a_caption_with_half_a_character_is_a_bad_sample_or_read(
    tokenizer: WhisperTokenizerFast, prefix: list[int]
) -> None:
    content = b'{"caption": "A bell \\ud83d"}'  # an emoji cut in two, as some crawlers leave it
    encoder = CaptionEncoder(tokenizer.backend_tokenizer, prefix, positions=64, long_caption="skip")
    try:
        encoder.encode(find_captions(content, ["caption"])[0])
    except BadSample as error:
        assert "caption" in str(error)
