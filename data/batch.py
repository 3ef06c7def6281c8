"""Samples laid end to end to the tensors that a forward pass takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data.captions import IGNORED, Tokens
from data.decode import SAMPLE_RATE
from data.windows import HOP

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Masks:
    """What is hidden of a clip's log-mel: stretches of time, (m, 2) float32, and bands of mel, (k, 2). Of
    each its width, as a share of the frames with sound (the bands) that there are, and its place, as a share
    of the room that is left."""

    time: npt.NDArray[np.float32]
    bands: npt.NDArray[np.float32]


NO_MASKS = Masks(np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32))


@dataclass(frozen=True)
class Sample:
    """A decoded clip with its caption. waveform: (n,) int16 at 16 kHz; source: number of its source; key:
    SOURCE/SHARD/KEY; frames: mel frames that the encoder takes, an even number; what the clip does not fill
    is silence; masks: what is hidden of it; references: all captions that the clip has; begins: seconds of
    the recording that lie before it."""

    waveform: npt.NDArray[np.int16]
    tokens: Tokens
    caption: str
    source: int
    key: str
    frames: int
    masks: Masks = NO_MASKS
    references: tuple[str, ...] = ()
    begins: float = 0.0

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return len(self.waveform) / SAMPLE_RATE


@dataclass(frozen=True)
class Segments:
    """Where the sequences lie that a tensor holds end to end. lengths: of the B sequences; bounds: (B + 1,)
    int32, where each begins, and where the last one ends; longest: the largest length, which compiled code
    takes from here: if it looked at `lengths`, it would be compiled for each batch."""

    lengths: tuple[int, ...]
    bounds: torch.Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Segments:
        """Sequences of these lengths, on the CPU."""
        bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        return cls(tuple(lengths), bounds, max(lengths))

    def to(self, device: torch.device) -> Segments:
        """The same on a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Change) -> Segments:
        """The same with the tensor changed."""
        return replace(self, bounds=change(self.bounds))

    @property
    def count(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Sum of the lengths."""
        return sum(self.lengths)

    @property
    def are_equal(self) -> bool:
        """Whether all are equally long."""
        return len(set(self.lengths)) == 1

    @cached_property
    def owners(self) -> torch.Tensor:
        """(total,) int64: the sequence of each element."""
        numbers = torch.arange(self.count, device=self.bounds.device)
        return numbers.repeat_interleave(self.bounds.diff(), output_size=self.total)

    @cached_property
    def positions(self) -> torch.Tensor:
        """(total,) int64: the place of each element in its sequence, from 0."""
        return torch.arange(self.total, device=self.bounds.device) - self.bounds[self.owners]


@dataclass(frozen=True)
class Batch:
    """A micro-batch: B clips end to end.

    waveforms: (N,) int16 at 16 kHz, and `sound` where each lies in it; audio: the encoder's positions of each
    clip, half its mel frames; decoder_input_ids, labels: (T,) int64, -100 where nothing is to be learnt, and
    `text` where each caption lies in them; source: (B,) source numbers; time_masks, band_masks: (B, m, 2) and
    (B, k, 2) float32, `Masks` of each clip; keys: of the B samples (none in a batch that only keeps a rank in
    step).
    """

    waveforms: torch.Tensor
    sound: Segments
    audio: Segments
    decoder_input_ids: torch.Tensor
    labels: torch.Tensor
    text: Segments
    source: torch.Tensor
    time_masks: torch.Tensor
    band_masks: torch.Tensor
    keys: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Change) -> Batch:
        """The same batch with each of its tensors changed."""
        tensors: dict[str, Any] = {
            name: change(getattr(self, name))
            for name in (
                "waveforms",
                "decoder_input_ids",
                "labels",
                "source",
                "time_masks",
                "band_masks",
            )
        }
        segments = {name: getattr(self, name).map(change) for name in ("sound", "audio", "text")}
        return replace(self, **tensors, **segments)


def collate(samples: Sequence[Sample]) -> Batch:
    """Lay samples end to end.

    Without samples the batch is one silent clip of a single position without labels: its loss and gradient
    are 0.
    """
    silence = Sample(np.zeros(1, np.int16), Tokens([0], [IGNORED]), "", 0, "", frames=2)
    clips = list(samples) or [silence]
    return Batch(
        waveforms=torch.from_numpy(np.concatenate([clip.waveform for clip in clips])),
        sound=Segments.of([len(clip.waveform) for clip in clips]),
        audio=Segments.of([clip.frames // 2 for clip in clips]),
        decoder_input_ids=torch.tensor([token for clip in clips for token in clip.tokens.input_ids]),
        labels=torch.tensor([label for clip in clips for label in clip.tokens.labels]),
        text=Segments.of([len(clip.tokens.labels) for clip in clips]),
        source=torch.tensor([clip.source for clip in clips]),
        time_masks=torch.from_numpy(np.stack([clip.masks.time for clip in clips])),
        band_masks=torch.from_numpy(np.stack([clip.masks.bands for clip in clips])),
        keys=tuple(sample.key for sample in samples),
    )


@dataclass(frozen=True)
class Size:
    """How much a micro-batch may hold.

    seconds: of audio; window_seconds: the model's window; tokens: the decoder's positions. Captions count,
    too: a batch of whole windows has at most so many tokens as they have positions, and no batch has more.
    """

    seconds: float
    window_seconds: float
    tokens: int

    def of(self, sample: Sample) -> float:
        """What a sample counts for, in seconds: its audio as the encoder takes it, or its caption if that is
        a larger part of the decoder's positions."""
        return max(
            sample.frames * HOP / SAMPLE_RATE,
            len(sample.tokens.labels) / self.tokens * self.window_seconds,
        )

    def cut(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Samples in turn, cut to groups of at most `seconds`; one that is larger stands alone."""
        groups: list[list[Sample]] = []
        room = 0.0
        for sample in samples:
            size = self.of(sample)
            if not groups or size > room:
                groups.append([])
                room = self.seconds
            groups[-1].append(sample)
            room -= size
        return groups
