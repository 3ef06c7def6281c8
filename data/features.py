"""Log-mel spectrograms, equal to those of WhisperFeatureExtractor, on the device that trains."""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers.audio_utils import mel_filter_bank

from data.decode import SAMPLE_RATE
from data.windows import HOP

WINDOW = 400  # samples of the Hann window, 25 ms
BAND = 16
"""Mel filters that are applied at a time: each looks at few bins, neighbours at the same."""


def log_mel(waveforms: torch.Tensor, lengths: torch.Tensor, frames: int, mels: int) -> torch.Tensor:
    """Log-mel spectrograms of a batch, each as if its waveform had been padded with silence to the window.

    waveforms: (B, N) int16 at 16 kHz; lengths: (B,) samples of each that count, at most frames * 160. Returns
    (B, mels, frames) float32. Equal to WhisperFeatureExtractor (fed the same int16) to 1e-5.
    """
    out = torch.empty(len(waveforms), mels, frames, device=waveforms.device)
    if waveforms.device.type == "cpu":  # faster by the clip, and only the frames that touch sound
        for waveform, length, row in zip(waveforms, lengths.tolist(), out, strict=True):
            _spectrum(waveform[None, :length], -(-(length + WINDOW // 2) // HOP), row[None])
    else:
        sounding = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
        _spectrum(waveforms * sounding, frames, out)
    return out


def _spectrum(waveforms: torch.Tensor, touched: int, out: torch.Tensor) -> None:
    """(B, N) int16 -> out, (B, mels, frames); only the first `touched` frames see sound, the others are the
    value of silence."""
    _, mels, frames = out.shape
    touched = min(touched, frames)
    audio = waveforms.to(torch.float32) / 32768
    # Two more hops are more than half a window.
    audio = torch.nn.functional.pad(audio, (0, min(frames, touched + 2) * HOP - audio.shape[1]))
    half = WINDOW // 2
    # Reflected at its ends, as Whisper's is.
    padded = torch.cat([audio[:, 1 : half + 1].flip(1), audio, audio[:, -half - 1 : -1].flip(1)], dim=1)
    hann, bands = _constants(mels, audio.device)
    framed = padded[:, : WINDOW + (touched - 1) * HOP].unfold(-1, WINDOW, HOP) * hann
    squares = torch.view_as_real(torch.fft.rfft(framed)).square()
    power = (squares[..., 0] + squares[..., 1]).mT  # (B, bins, touched)
    energy = torch.cat([filters @ power[:, bins] for bins, filters in bands], dim=1)  # (B, mels, touched)
    energy = energy.clamp_(min=1e-10).log10_()
    floor = energy.amax((1, 2), keepdim=True) - 8.0
    out[:, :, :touched] = (energy.maximum(floor) + 4.0) / 4.0
    out[:, :, touched:] = (floor.clamp(min=-10.0) + 4.0) / 4.0


@lru_cache
def _constants(mels: int, device: torch.device) -> tuple[torch.Tensor, list[tuple[slice, torch.Tensor]]]:
    """The window, and the mel filters in bands: the bins that neighbouring filters look at, and their weights
    (filters, bins)."""
    bank = torch.from_numpy(
        mel_filter_bank(
            1 + WINDOW // 2, mels, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
        )
    )
    bands = []
    for filters in bank.T.to(device, torch.float32).split(BAND):
        seen = filters.any(0).nonzero()[:, 0]
        bins = slice(int(seen[0]), int(seen[-1]) + 1)
        bands.append((bins, filters[:, bins].contiguous()))
    return torch.hann_window(WINDOW, device=device), bands
