"""Readers of the same clips, one per module, each written as its users write it: `read(task)` yields batches
of BATCH clips without end, shuffled within an epoch.

All but Earwitness read, decode and compute in the thread that iterates: a DataLoader's worker would do the
same, and would have to pass the batches on, too.
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
"""Length of the audio window."""
MELS = 128
SEED = 1
SHUFFLE = 256
"""Samples in the shuffle buffer of the readers that have one."""


@dataclass(frozen=True)
class Task:
    """What a reader reads."""

    model: str
    """Folder of a Whisper, for its processor."""
    shards: list[str]
    """Paths or URLs of tars."""
    chunks: str
    """A folder or prefix with the same clips in litdata's format."""
    ending: str
    """Format of the clips, as the ending of their names."""
    index_dir: str
    work: str
    """A folder for what the reader writes."""


@dataclass(frozen=True)
class Ready:
    """A batch as a model takes it."""

    features: torch.Tensor
    """(B, MELS, 3000) float32; the reader `waveforms` gives waveforms."""
    labels: torch.Tensor
    """(B, T) int64."""
    keys: Sequence[str]
    """Keys of the B samples, as the tar has them."""


class Preparation:
    """Gives clips and captions to Whisper's processor, as users of the other readers do."""

    def __init__(self, model: str) -> None:
        processor = WhisperProcessor.from_pretrained(model)
        self.extractor, self.tokenizer = processor.feature_extractor, processor.tokenizer

    def __call__(
        self, waveforms: Sequence[npt.NDArray[np.float32]], captions: Sequence[str], keys: Sequence[str]
    ) -> Ready:
        """A batch of waveforms, each (n,) at 16 kHz, with their captions."""
        extracted = self.extractor(list(waveforms), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        tokenized = self.tokenizer(list(captions), padding=True, return_tensors="pt")
        return Ready(extracted.input_features, tokenized.input_ids, keys)


def decode(content: bytes) -> npt.NDArray[np.float32]:
    """An audio file -> (n,) at 16 kHz, as users of the other readers write it."""
    audio, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    mono = audio.mean(axis=1)
    return mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE)
