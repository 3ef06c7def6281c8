"""Samples stacked to the tensors that a forward pass takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from data.captions import IGNORED, Tokens
from data.decode import SAMPLE_RATE


@dataclass(frozen=True)
class Sample:
    """A decoded clip with its caption. waveform: (n,) int16 at 16 kHz; source: number of its source; key:
    SOURCE/SHARD/KEY; frames: mel frames that the encoder takes, an even number; what the clip does not fill
    is silence."""

    waveform: npt.NDArray[np.int16]
    tokens: Tokens
    caption: str
    source: int
    key: str
    frames: int

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return len(self.waveform) / SAMPLE_RATE


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    waveforms: (B, N) int16 at 16 kHz; lengths: (B,) samples; decoder_input_ids, labels: (B, T) int64, -100
    where nothing is to be learnt; source: (B,) source numbers; keys: of the B samples (none in a batch that
    only keeps a rank in step); window: mel frames.
    """

    waveforms: torch.Tensor
    lengths: torch.Tensor
    decoder_input_ids: torch.Tensor
    labels: torch.Tensor
    source: torch.Tensor
    keys: tuple[str, ...]
    window: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("waveforms", "lengths", "decoder_input_ids", "labels", "source")
        }
        return replace(self, **moved)


def collate(samples: Sequence[Sample], window: int, pad_id: int) -> Batch:
    """Stack samples; pad waveforms with 0, decoder inputs with `pad_id` and labels with -100.

    Without samples the batch is one silent clip without labels: its loss and gradient are 0.
    """
    silence = Sample(np.zeros(1, np.int16), Tokens([pad_id], [IGNORED]), "", 0, "")
    clips = list(samples) or [silence]
    lengths = [len(clip.waveform) for clip in clips]
    waveforms = torch.zeros(len(clips), max(lengths), dtype=torch.int16)
    inputs = torch.full((len(clips), max(len(clip.tokens.labels) for clip in clips)), pad_id)
    labels = torch.full_like(inputs, IGNORED)
    for row, clip in enumerate(clips):
        waveforms[row, : len(clip.waveform)] = torch.from_numpy(clip.waveform)
        inputs[row, : len(clip.tokens.input_ids)] = torch.tensor(clip.tokens.input_ids)
        labels[row, : len(clip.tokens.labels)] = torch.tensor(clip.tokens.labels)
    return Batch(
        waveforms=waveforms,
        lengths=torch.tensor(lengths),
        decoder_input_ids=inputs,
        labels=labels,
        source=torch.tensor([clip.source for clip in clips]),
        keys=tuple(sample.key for sample in samples),
        window=window,
    )


def micro_batches(
    samples: Sequence[Sample], micro_size: int, count: int, window: int, pad_id: int
) -> list[Batch]:
    """Cut a rank's samples of a step into exactly `count` micro-batches, empty ones at the end, so that all
    ranks have as many."""
    return [collate(samples[i * micro_size : (i + 1) * micro_size], window, pad_id) for i in range(count)]
