"""Clips that are changed by chance: mixed with another one, played faster or slower, louder or quieter, with
noise, and with parts of their log-mel hidden. What a sample gets depends on seed, epoch and sample alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

from configs.schema import Augment
from data.batch import NO_MASKS, Masks
from data.order import (
    EMPTY,
    GAIN,
    MASKS,
    MIX,
    NOISE,
    NOISE_BITS,
    NOISE_SNR,
    PARTNER,
    SPEED,
    Ints,
    fractions,
    is_chosen,
    random_keys,
    uniform,
)

Waveform = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]
NEIGHBOURS = 8
"""A clip is mixed with one of so many that follow it in its shard: most are read along with it."""
FAR_APART = 30.0
"""Times that one clip may be louder than another one; farther apart they are not mixed, as one is (nearly)
silent."""
FULL_SCALE_NOISE = 32768 / math.sqrt(3)
"""Root mean square of random 16-bit numbers."""


class Augmentation:
    """What `data.augment` makes of the samples of an index. Safe to use from several threads."""

    def __init__(self, settings: Augment, seed: int, shard: npt.NDArray[Any], longest: int) -> None:
        """shard: (n,) number of the shard of each sample of the index, in ascending order; longest: samples
        that a waveform may have."""
        self.settings = settings
        self._seed, self._shard, self._longest = seed, shard, longest

    def partners(self, rows: Ints, epoch: int) -> Ints:
        """The clip that is mixed into each sample, by its row: another one of its shard; EMPTY where none is,
        and where there is no sample."""
        if not self.settings.mix:
            return np.full_like(rows, EMPTY)
        shard = self._shard[rows]
        first = np.searchsorted(self._shard, shard)
        count = np.searchsorted(self._shard, shard, "right") - first
        nearest = np.clip(count - 1, 1, NEIGHBOURS)
        step = 1 + (uniform(rows, self._seed, PARTNER, epoch) * nearest).astype(np.int64)
        is_mixed = is_chosen(rows, self.settings.mix, self._seed, MIX, epoch)
        return np.where(
            is_mixed & (count > 1) & (rows != EMPTY), first + (rows - first + step) % count, EMPTY
        )

    def lengths(self, length_of: Callable[[Ints], Ints], rows: Ints, epoch: int) -> Ints:
        """Lengths that the waveforms of samples get, (n,), in samples at 16 kHz. length_of: those of clips as
        they are read, by their rows."""
        lengths, partners = length_of(rows), self.partners(rows, epoch)
        is_mixed = partners != EMPTY
        lengths[is_mixed] = np.maximum(lengths[is_mixed], length_of(partners[is_mixed]))
        return self._played(lengths, rows, epoch)

    def waveform(self, clip: Waveform, row: int, epoch: int) -> Waveform:
        """A clip, mixed already, at its speed and loudness and with its noise. What exceeds full scale is
        clipped."""
        audio = np.asarray(clip, np.float32)
        length = int(self._played(np.array([len(clip)]), [row], epoch)[0])
        if length != len(clip):
            audio = _at_length(audio, length)
        if self.settings.gain_db:
            gain = self.settings.gain_db * (2 * uniform([row], self._seed, GAIN, epoch)[0] - 1)
            audio = audio * np.float32(10 ** (gain / 20))
        if self.settings.noise_snr_db and is_chosen(
            [row], self.settings.noise_share, self._seed, NOISE, epoch
        ):
            audio = audio + self._noise(audio, self.settings.noise_snr_db, row, epoch)
        return _as_int16(audio)

    def masks(self, row: int, epoch: int) -> Masks:
        """What is hidden of a clip's log-mel."""
        settings = self.settings.spec_augment
        count = settings.time_masks + settings.band_masks
        if not count:
            return NO_MASKS
        draws = fractions(random_keys(2 * count, self._seed, MASKS, epoch, row)).reshape(count, 2)
        widest = [settings.time_share] * settings.time_masks + [settings.band_share] * settings.band_masks
        draws[:, 0] *= widest
        time, bands = np.split(draws.astype(np.float32), [settings.time_masks])
        return Masks(time, bands)

    def _played(self, lengths: Ints, rows: npt.ArrayLike, epoch: int) -> Ints:
        """Lengths of clips at their speed, (n,): none exceeds the longest for being slowed down."""
        if self.settings.speed is None:
            return lengths
        low, high = self.settings.speed
        speeds = low + (high - low) * uniform(rows, self._seed, SPEED, epoch)
        return np.clip(np.rint(lengths / speeds), 1, self._longest).astype(np.int64)

    def _noise(self, audio: Floats, snr_db: tuple[float, float], row: int, epoch: int) -> Floats:
        """White noise for a clip, as much quieter than it as drawn."""
        low, high = snr_db
        below = low + (high - low) * uniform([row], self._seed, NOISE_SNR, epoch)[0]
        bits = random_keys(-(-len(audio) // 4), self._seed, NOISE_BITS, epoch, row)  # 4 times 16 of them
        level = _loudness(audio) * 10 ** (-below / 20) / FULL_SCALE_NOISE
        return bits.view(np.int16)[: len(audio)] * np.float32(level)


def mixed(one: Waveform, other: Waveform) -> Waveform | None:
    """Two clips at a time, as long as the longer one and equally loud, each at half its amplitude so that
    little has to be clipped; None if one of them is far louder."""
    loudness, of_other = _loudness(one), _loudness(other)
    if FAR_APART * min(loudness, of_other) <= max(loudness, of_other):
        return None
    audio = np.zeros(max(len(one), len(other)), np.float32)
    audio[: len(one)] += np.float32(0.5) * one
    audio[: len(other)] += np.float32(0.5 * loudness / of_other) * other
    return _as_int16(audio)


def joined(first: str, second: str) -> str:
    """One caption for two clips that are mixed: of "A dog barks." and "A bell rings.", "A dog barks and a
    bell rings."

    The second one keeps its capital where it begins with what looks like a name or an acronym: a word with
    another capital or a digit ("TV", "McDonald"), with such a capital after it ("John Smith"), or "I". A
    first name by itself is not known for one.
    """
    return f"{first.rstrip().rstrip('.').rstrip()} and {_continued(second.lstrip())}"


def _continued(caption: str) -> str:
    word, _, rest = caption.partition(" ")
    is_name = word[1:] != word[1:].lower() or any(letter.isdigit() for letter in word) or rest[:1].isupper()
    is_i = word == "I" or word.startswith(("I'", "I’"))  # noqa: RUF001
    return caption if is_name or is_i else caption[:1].lower() + caption[1:]


def _at_length(audio: Floats, length: int) -> Floats:
    """A clip that is played so fast that it takes `length` samples."""
    played = soxr.resample(audio, len(audio), length)[:length]  # which may be a sample longer or shorter
    return np.pad(played, (0, length - len(played)))


def _loudness(audio: npt.NDArray[Any]) -> float:
    """Root mean square."""
    return math.sqrt(np.square(audio, dtype=np.float32).mean(dtype=np.float64))


def _as_int16(audio: Floats) -> Waveform:
    return np.clip(np.rint(audio), -32768, 32767).astype(np.int16)
