"""Whisper as transformers computes it, one clip at a time: what ours is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from data.batch import Sample


def features(sample: Sample, mels: int, window: int) -> torch.Tensor:
    """The first `sample.frames` mel frames of a clip that is padded to the window: (mels, frames) float32."""
    extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=window // 100)
    waveform = sample.waveform / np.float32(32768)
    padded = extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_features[0]
    return padded[:, : sample.frames]


def logits(model: WhisperForConditionalGeneration, sample: Sample, window: int) -> torch.Tensor:
    """Those of a clip's tokens, (T, vocabulary). window: mel frames of the model's."""
    mel = features(sample, model.config.num_mel_bins, window)
    with _window_of(model, sample.frames // 2):
        return model(
            input_features=mel[None].to(model.dtype),
            decoder_input_ids=torch.tensor([sample.tokens.input_ids]),
            use_cache=False,
        ).logits[0]


def caption(
    model: WhisperForConditionalGeneration,
    sample: Sample,
    window: int,
    generation: GenerationConfig,
    prompt: list[int],
) -> list[int]:
    """Tokens of what `generate` says of a clip. window: mel frames of the model's."""
    mel = features(sample, model.config.num_mel_bins, window)
    spoken = {"language": "en", "task": "transcribe"} if generation.is_multilingual else {}
    with _window_of(model, sample.frames // 2):
        tokens = model.generate(
            mel[None].to(model.dtype),
            generation_config=generation,
            prompt_ids=torch.tensor(prompt) if prompt else None,
            **spoken,
        )
    return tokens[0].tolist()


@contextmanager
def _window_of(model: WhisperForConditionalGeneration, positions: int) -> Iterator[None]:
    """Meanwhile a Whisper whose window is that long."""
    encoder, whole = model.model.encoder, model.model.encoder.embed_positions
    longest = encoder.config.max_source_positions
    encoder.config.max_source_positions = positions
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(whole.weight[:positions])
    try:
        yield
    finally:
        encoder.config.max_source_positions = longest
        encoder.embed_positions = whole
