"""Log-mel spectrograms, equal to those of WhisperFeatureExtractor, on the device that trains."""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers.audio_utils import mel_filter_bank

from data.decode import SAMPLE_RATE

WINDOW = 400  # samples of the Hann window, 25 ms
HOP = 160  # samples between frames, 10 ms


def log_mel(waveforms: torch.Tensor, lengths: torch.Tensor, frames: int, mels: int) -> torch.Tensor:
    """Log-mel spectrograms of a batch, each as if its waveform had been padded with silence to the window.

    waveforms: (B, N) int16 at 16 kHz; lengths: (B,) samples of each that count, at most frames * 160. Returns (B, mels, frames)
    float32. Equal to WhisperFeatureExtractor (fed the same int16) to 1e-5.
    """
    if waveforms.device.type == "cpu":  # one clip at a time is faster there, and only the frames that touch sound
        clips = [_spectrum(w[None, :n], frames, mels, -(-(int(n) + WINDOW // 2) // HOP)) for w, n in zip(waveforms, lengths, strict=True)]
        return torch.cat(clips)
    sounding = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
    return _spectrum(waveforms * sounding, frames, mels, frames)


def _spectrum(waveforms: torch.Tensor, frames: int, mels: int, touched: int) -> torch.Tensor:
    """(B, N) int16 -> (B, mels, frames); only the first `touched` frames see sound, the others are the value of silence."""
    touched = min(touched, frames)
    audio = waveforms.to(torch.float32) / 32768
    audio = torch.nn.functional.pad(audio, (0, frames * HOP - audio.shape[1]))
    padded = torch.nn.functional.pad(audio[:, None], (WINDOW // 2, WINDOW // 2), mode="reflect")[:, 0]
    hann, filters = _constants(mels, audio.device)
    framed = padded[:, : WINDOW + (touched - 1) * HOP].unfold(-1, WINDOW, HOP) * hann
    spectrum = torch.fft.rfft(framed)
    power = spectrum.real.square() + spectrum.imag.square()
    energy = (power @ filters).clamp_(min=1e-10).log10_()  # (B, touched, mels)
    floor = energy.amax((1, 2), keepdim=True) - 8.0
    silence = (floor.clamp(min=-10.0) + 4.0) / 4.0
    out = silence.expand(-1, mels, frames).clone()
    out[:, :, :touched] = ((energy.maximum(floor) + 4.0) / 4.0).transpose(1, 2)
    return out


@lru_cache
def _constants(mels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    bank = mel_filter_bank(1 + WINDOW // 2, mels, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.hann_window(WINDOW, device=device), torch.from_numpy(bank).to(device, torch.float32)
