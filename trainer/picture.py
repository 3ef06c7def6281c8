"""A clip as a picture: its log-mel spectrogram, time from left to right, low tones at the bottom."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from data.batch import Segments
from data.features import log_mel
from data.windows import HOP

MELS = 80
WIDEST = 400
"""Columns of a picture."""
MAGMA = ("000004", "180f3d", "440f76", "721f81", "9e2f7f", "cd4071", "f1605d", "fd9668", "feca8d", "fcfdbf")
"""From silence to the loudest, evenly spaced; each is lighter than the one before."""


def picture(waveform: torch.Tensor, colours: int) -> npt.NDArray[np.uint8]:
    """The colour of each point, by its number in the palette. (n,) int16 -> (MELS, up to WIDEST)."""
    positions = max(1, -(-len(waveform) // (2 * HOP)))
    sound, audio = Segments.of([len(waveform)]), Segments.of([positions])
    mel = log_mel(waveform, sound, audio, MELS, window=2 * positions)
    mel = torch.nn.functional.adaptive_avg_pool1d(mel, min(WIDEST, 2 * positions)).flip(0)
    low, high = mel.aminmax()
    levels = (mel - low) / (high - low).clamp(min=1e-6) * (colours - 1)
    numbers: npt.NDArray[np.uint8] = levels.round().to(torch.uint8).numpy()
    return numbers


def palette(colours: int) -> npt.NDArray[np.uint8]:
    """Red, green and blue of each colour, (colours, 3)."""
    anchors = np.array([list(bytes.fromhex(colour)) for colour in MAGMA], dtype=float)
    places = np.linspace(0, len(anchors) - 1, colours)
    channels = [np.interp(places, np.arange(len(anchors)), channel) for channel in anchors.T]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)
