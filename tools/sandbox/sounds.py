"""Sounds made from numbers, with captions that say what is in them: kind, number, length, pitch and order.

A caption describes one or two groups of equal sounds, as "Two short high beeps then one long low buzz." A
tenth of all captions is held out, chosen by the SHA-256 of their text: none of these occurs in training, and
no tokenizer is trained on them. So a model that gets one right has put it together from what it knows.
"""

from __future__ import annotations

import csv
import hashlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

SAMPLE_RATE = 16_000  # Hz
KINDS = ("beep", "rising tone", "falling tone", "noise burst", "buzz")
PITCHES = {"low": (200, 300), "middle": (600, 900), "high": (1800, 2600)}  # Hz
LENGTHS = {"short": 0.2, "long": 0.5}  # seconds
NUMBERS = ("one", "two", "three", "four")
PAUSE, PAUSE_OF_GROUPS = 0.15, 0.4  # seconds
EDGE = 0.01  # seconds in which a sound fades in, and out
LONGEST = 4.0
"""Seconds that no clip exceeds."""
HELD_OUT = 0.1

Waveform = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Equal sounds in a row."""

    kind: str
    pitch: str
    length: str
    count: int

    def __str__(self) -> str:
        ending = ""
        if self.count > 1:
            ending = "es" if self.kind.endswith("z") else "s"
        return f"{NUMBERS[self.count - 1]} {self.length} {self.pitch} {self.kind}{ending}"


def caption_of(groups: list[Group]) -> str:
    """A sentence that says what is to be heard."""
    text = " then ".join(map(str, groups))
    return f"{text.capitalize()}."


def is_held_out(caption: str) -> bool:
    """Whether clips with this caption are kept from training."""
    return hashlib.sha256(caption.encode()).digest()[0] < HELD_OUT * 256


def write_clips(folder: Path, training: int, held_out: int, seed: int) -> Path:
    """Write that many clips as FLAC and a CSV (file, caption, split = train or held-out); returns the CSV."""
    (folder / "train").mkdir(parents=True)
    (folder / "held-out").mkdir()
    splits = ["train"] * training + ["held-out"] * held_out
    numbers = [*range(training), *range(held_out)]
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(partial(_write_clip, folder, seed), splits, numbers, chunksize=64))
    table = folder / "clips.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file", "caption", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return table


def _write_clip(folder: Path, seed: int, split: str, number: int) -> dict[str, str]:
    """Write clip `number` of a split; returns its row of the CSV."""
    random = np.random.default_rng([seed, int(split == "train"), number])
    groups = _draw(random)
    while is_held_out(caption_of(groups)) != (split == "held-out"):
        groups = _draw(random)
    file = f"{split}/{number:05d}.flac"
    soundfile.write(folder / file, _clip(random, groups), SAMPLE_RATE)
    return {"file": file, "caption": caption_of(groups), "split": split}


def _draw(random: np.random.Generator) -> list[Group]:
    """One group of one to four sounds, or two groups of one or two each."""
    two = bool(random.integers(2))

    def group() -> Group:
        count = int(random.integers(1, 3 if two else 5))
        return Group(
            kind=str(random.choice(KINDS)),
            pitch=str(random.choice(list(PITCHES))),
            length=str(random.choice(list(LENGTHS))),
            count=count,
        )

    return [group(), group()] if two else [group()]


def _clip(random: np.random.Generator, groups: list[Group]) -> Waveform:
    """A clip of these groups: (n,) at 16 kHz, with pauses and a little noise."""
    parts = [np.zeros(int(random.uniform(0.05, 0.3) * SAMPLE_RATE))]
    for group in groups:
        for _ in range(group.count):
            parts += [_sound(random, group) * random.uniform(0.3, 0.8), np.zeros(int(PAUSE * SAMPLE_RATE))]
        parts.append(np.zeros(int((PAUSE_OF_GROUPS - PAUSE) * SAMPLE_RATE)))
    clip = np.concatenate(parts)
    assert len(clip) <= LONGEST * SAMPLE_RATE
    return clip + random.standard_normal(len(clip)) * 0.002


def _sound(random: np.random.Generator, group: Group) -> Waveform:
    """One sound of a group: (n,) at 16 kHz."""
    seconds = LENGTHS[group.length]
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = random.uniform(*PITCHES[group.pitch])
    match group.kind:
        case "beep":
            wave = np.sin(2 * np.pi * pitch * time)
        case "buzz":
            wave = 0.5 * np.sign(np.sin(2 * np.pi * pitch * time))
        case "rising tone":  # from the pitch to twice the pitch
            wave = np.sin(2 * np.pi * pitch * (time + time**2 / (2 * seconds)))
        case "falling tone":  # from twice the pitch to the pitch
            wave = np.sin(2 * np.pi * pitch * (2 * time - time**2 / (2 * seconds)))
        case _:
            wave = _noise(random, len(time), pitch)
    return wave * np.minimum(1, np.minimum(time, time[::-1]) / EDGE)


def _noise(random: np.random.Generator, length: int, pitch: float) -> Waveform:
    """Noise in a band around a pitch (Hz)."""
    spectrum = np.fft.rfft(random.standard_normal(length))
    frequency = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
    spectrum[(frequency < 0.7 * pitch) | (frequency > 1.4 * pitch)] = 0
    wave = np.fft.irfft(spectrum, length)
    return wave / np.abs(wave).max()
