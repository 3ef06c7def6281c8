"""Log-mel spectrograms, equal to those of WhisperFeatureExtractor, on the device that trains."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from data.batch import Segments
from data.decode import SAMPLE_RATE
from data.windows import HOP

WINDOW = 400  # samples of the Hann window, 25 ms
SILENCE = -10.0  # of the logarithm
BAND = 16
"""Mel filters that are applied at a time: each looks at few bins, neighbours at the same."""


def log_mel(
    waveforms: torch.Tensor, sound: Segments, audio: Segments, mels: int, window: int
) -> torch.Tensor:
    """Log-mel spectrograms of clips that lie end to end, each as if its waveform had been padded with silence
    to the model's window.

    waveforms: (N,) int16 at 16 kHz; sound: where each clip lies in it; audio: half the mel frames that are
    wanted of each; window: mel frames of the model's window. Returns (mels, F) float32, F the frames wanted
    of all. Equal to the first frames of WhisperFeatureExtractor (fed the same int16) to 1e-5.
    """
    # All that see sound are computed, even if fewer are wanted: the loudest of a clip sets its floor.
    seeing = [min(window, -(-(length + WINDOW // 2) // HOP)) for length in sound.lengths]
    wanted = [2 * positions for positions in audio.lengths]
    if waveforms.device.type == "cpu":  # faster by the clip
        clips = zip(waveforms.split(list(sound.lengths)), seeing, wanted, strict=True)
        return torch.cat([_of_clip(clip, sees, wants, mels, window) for clip, sees, wants in clips], 1)
    device = waveforms.device
    return _of_clips(
        waveforms, sound, Segments.of(seeing).to(device), Segments.of(wanted).to(device), mels, window
    )


def hide(
    mel: torch.Tensor, sound: Segments, audio: Segments, time_masks: torch.Tensor, band_masks: torch.Tensor
) -> torch.Tensor:
    """Log-mel of clips that lie end to end, (mels, F), with the mean of a clip in place of what its masks
    hide. sound, audio: as for `log_mel`; time_masks, band_masks: of `Batch`.

    Only frames that hold sound are hidden, and make the mean: padding stays as it is.
    """
    if not time_masks.numel() and not band_masks.numel():
        return mel
    frames = Segments.of([2 * positions for positions in audio.lengths]).to(mel.device)
    hearing = [
        min(wanted, 2 * -(-length // (2 * HOP)))
        for wanted, length in zip(frames.lengths, sound.lengths, strict=True)
    ]
    heard = torch.tensor(hearing, device=mel.device)
    clip, place = frames.owners, frames.positions
    is_heard = place < heard[clip]
    first, end = _stretches(time_masks, heard)
    in_time = ((place[:, None] >= first[clip]) & (place[:, None] < end[clip])).any(1)
    first, end = _stretches(band_masks, torch.full_like(heard, len(mel)))
    band = torch.arange(len(mel), device=mel.device)[:, None, None]
    in_bands = ((band >= first) & (band < end)).any(2)  # (mels, B)
    is_hidden = (in_time | in_bands[:, clip]) & is_heard
    means = mel.new_zeros(len(heard)).index_add_(0, clip, mel.mean(0) * is_heard) / heard
    return torch.where(is_hidden, means[clip], mel)


def _stretches(masks: torch.Tensor, room: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, m, 2) shares of the room of each clip, (B,) -> first place and place after the last one, (B, m)."""
    width = (masks[..., 0] * room[:, None]).long()
    first = (masks[..., 1] * (room[:, None] - width + 1)).long()
    return first, first + width


def _of_clip(waveform: torch.Tensor, seeing: int, wanted: int, mels: int, window: int) -> torch.Tensor:
    """(n,) int16 -> (mels, wanted). seeing: frames that see sound."""
    half = WINDOW // 2
    audio = waveform.to(torch.float32) / 32768
    # Two more hops are more than half a window.
    audio = torch.nn.functional.pad(audio, (0, min(window, seeing + 2) * HOP - len(audio)))
    # Reflected at its ends, as Whisper's is.
    padded = torch.cat([audio[1 : half + 1].flip(0), audio, audio[-half - 1 : -1].flip(0)])
    energy = _log_energy(padded[: WINDOW + (seeing - 1) * HOP].unfold(0, WINDOW, HOP), mels)
    floor = energy.max() - 8.0
    silent = energy.new_full((mels, max(0, wanted - seeing)), SILENCE)
    return (torch.cat([energy[:, :wanted], silent], 1).maximum(floor) + 4.0) / 4.0


def _of_clips(
    waveforms: torch.Tensor, sound: Segments, seeing: Segments, wanted: Segments, mels: int, window: int
) -> torch.Tensor:
    """The same for all clips at once: (N,) int16 -> (mels, F)."""
    slots = Segments.of([(frames + 2) * HOP for frames in seeing.lengths]).to(waveforms.device)
    clip = slots.owners
    place = (slots.positions - WINDOW // 2).abs()
    last = window * HOP - 1
    place = torch.where(place > last, 2 * last - place, place)
    is_sound = place < sound.bounds.diff()[clip]
    audio = waveforms[(sound.bounds[clip] + place).clamp(max=len(waveforms) - 1)] * is_sound / 32768
    frames = (slots.bounds[:-1] // HOP)[seeing.owners] + seeing.positions
    energy = _log_energy(audio.unfold(0, WINDOW, HOP)[frames], mels)
    loudest = energy.new_full((sound.count,), SILENCE)
    loudest.scatter_reduce_(0, seeing.owners, energy.amax(0), "amax")
    clip = wanted.owners
    sees = wanted.positions < seeing.bounds.diff()[clip]
    frames = (seeing.bounds[clip] + wanted.positions).clamp(max=seeing.total - 1)
    return (energy[:, frames].where(sees, SILENCE).maximum(loudest[clip] - 8.0) + 4.0) / 4.0


def _log_energy(framed: torch.Tensor, mels: int) -> torch.Tensor:
    """What frames see, (frames, WINDOW) -> logarithm of the energy of their mel bands, (mels, frames)."""
    hann, bands = _constants(mels, framed.device)
    squares = torch.view_as_real(torch.fft.rfft(framed * hann)).square()
    power = (squares[..., 0] + squares[..., 1]).T  # (bins, frames)
    energy = torch.cat([filters @ power[bins] for bins, filters in bands])
    return energy.clamp_(min=1e-10).log10_()


@lru_cache
def _constants(mels: int, device: torch.device) -> tuple[torch.Tensor, list[tuple[slice, torch.Tensor]]]:
    """The window, and the mel filters in bands: the bins that neighbouring filters look at, and their weights
    (filters, bins)."""
    bank = torch.from_numpy(mel_filters(mels))
    bands = []
    for filters in bank.T.to(device, torch.float32).split(BAND):
        seen = filters.any(0).nonzero()[:, 0]
        bins = slice(int(seen[0]), int(seen[-1]) + 1)
        bands.append((bins, filters[:, bins].contiguous()))
    return torch.hann_window(WINDOW, device=device), bands


def mel_filters(mels: int) -> npt.NDArray[np.float64]:
    """Slaney's mel filters, as Whisper has them: (bins, mels), triangles of equal area.

    They are evenly spaced up to 1 kHz, and evenly in its logarithm above.
    """
    linear, per_log = 3 / 200, 27 / np.log(6.4)  # mels per Hz, and per unit of log(Hz)
    highest = 1000 * linear + per_log * np.log(SAMPLE_RATE / 2 / 1000)
    at = np.linspace(
        0, highest, mels + 2
    )  # where a filter ends, the next one peaks, and the one after begins
    hertz = np.where(at < 1000 * linear, at / linear, 1000 * np.exp((at - 1000 * linear) / per_log))
    bins = np.linspace(0, SAMPLE_RATE / 2, 1 + WINDOW // 2)[:, None]
    begin, peak, end = hertz[:-2], hertz[1:-1], hertz[2:]
    triangles = np.minimum((bins - begin) / (peak - begin), (end - bins) / (end - peak))
    filters: npt.NDArray[np.float64] = np.maximum(0, triangles) * 2 / (end - begin)
    return filters
