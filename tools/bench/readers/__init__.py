"""Readers of the same clips, one per module, each as its users write it: `read(task)` yields batches of BATCH
for ever, shuffled within an epoch.

All but Earwitness read, decode and compute in the thread that iterates: a DataLoader's worker would do just
that, and pay for passing batches on.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
import torch
from transformers import WhisperProcessor

from data.decode import SAMPLE_RATE

BATCH = 16
SECONDS = 30
"""Audio window."""
MELS = 128
SEED = 1
SHUFFLE = 256
"""Samples of the shuffle buffer, where there is one."""


@dataclass(frozen=True)
class Task:
    """What is read. shards: paths or URLs of tars; chunks: a folder or prefix with the same clips in
    litdata's format; work: a folder for the run."""

    model: str
    shards: list[str]
    chunks: str
    ending: str
    index_dir: str
    work: str


@dataclass(frozen=True)
class Ready:
    """A batch that a model takes. features: (B, MELS, 3000) float32; labels: (B, T) int64; keys: of the B
    samples, as the tar has them."""

    features: torch.Tensor
    labels: torch.Tensor
    keys: Sequence[str]


class Preparation:
    """What users of the other readers do with clips and captions: give them to Whisper's processor."""

    def __init__(self, model: str) -> None:
        processor = WhisperProcessor.from_pretrained(model)
        self.extractor, self.tokenizer = processor.feature_extractor, processor.tokenizer

    def __call__(
        self, waveforms: Sequence[npt.NDArray[np.float32]], captions: Sequence[str], keys: Sequence[str]
    ) -> Ready:
        """waveforms: (n,) at 16 kHz each."""
        features = self.extractor(
            list(waveforms), sampling_rate=SAMPLE_RATE, return_tensors="pt"
        ).input_features
        return Ready(
            features, self.tokenizer(list(captions), padding=True, return_tensors="pt").input_ids, keys
        )


def decode(content: bytes) -> npt.NDArray[np.float32]:
    """An audio file -> (n,) at 16 kHz, as users of the other readers write it."""
    audio, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    return soxr.resample(audio.mean(axis=1), rate, SAMPLE_RATE) if rate != SAMPLE_RATE else audio.mean(axis=1)
