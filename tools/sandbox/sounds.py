"""Sounds that are made here, with captions that say what is in them: kind, number, length, pitch and order.

A caption describes one or two groups of equal sounds, as "Two short high beeps then one long low buzz." A
tenth of all captions is held out, by SHA-256 of the text: none of these occurs in training (nor may a
tokenizer see it), so a model that gets one right has put it together.
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
EDGE = 0.01  # seconds of fading in and out
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
        plural = "" if self.count == 1 else "es" if self.kind.endswith("z") else "s"
        return f"{NUMBERS[self.count - 1]} {self.length} {self.pitch} {self.kind}{plural}"


def caption_of(groups: list[Group]) -> str:
    """What is to be heard, in a sentence."""
    text = " then ".join(map(str, groups))
    return f"{text.capitalize()}."


def is_held_out(caption: str) -> bool:
    """Whether clips with this caption are kept from training."""
    return hashlib.sha256(caption.encode()).digest()[0] < HELD_OUT * 256


def write_clips(folder: Path, training: int, held_out: int, seed: int) -> Path:
    """Write that many clips as FLAC and a CSV (file, caption, split = train or held-out); returns the CSV."""
    (folder / "train").mkdir(parents=True)
    (folder / "held-out").mkdir()
    numbers = [("train", number) for number in range(training)] + [
        ("held-out", number) for number in range(held_out)
    ]
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(partial(_write_clip, folder, seed), numbers, chunksize=64))
    table = folder / "clips.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("file", "caption", "split"), *rows])
    return table


def _write_clip(folder: Path, seed: int, number: tuple[str, int]) -> tuple[str, str, str]:
    split, place = number
    random = np.random.default_rng([seed, split == "train", place])
    groups = _draw(random)
    while is_held_out(caption_of(groups)) != (split == "held-out"):
        groups = _draw(random)
    file = f"{split}/{place:05d}.flac"
    soundfile.write(folder / file, _clip(random, groups), SAMPLE_RATE)
    return file, caption_of(groups), split


def _draw(random: np.random.Generator) -> list[Group]:
    several = bool(random.integers(2))

    def group() -> Group:
        count = int(random.integers(1, 3 if several else 5))
        return Group(
            str(random.choice(KINDS)),
            str(random.choice(list(PITCHES))),
            str(random.choice(list(LENGTHS))),
            count,
        )

    return [group(), group()] if several else [group()]


def _clip(random: np.random.Generator, groups: list[Group]) -> Waveform:
    parts = [np.zeros(int(random.uniform(0.05, 0.3) * SAMPLE_RATE))]
    for group in groups:
        for _ in range(group.count):
            parts += [_sound(random, group) * random.uniform(0.3, 0.8), np.zeros(int(PAUSE * SAMPLE_RATE))]
        parts.append(np.zeros(int((PAUSE_OF_GROUPS - PAUSE) * SAMPLE_RATE)))
    clip = np.concatenate(parts)
    assert len(clip) <= LONGEST * SAMPLE_RATE
    return clip + random.standard_normal(len(clip)) * 0.002


def _sound(random: np.random.Generator, group: Group) -> Waveform:
    seconds = LENGTHS[group.length]
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    pitch = random.uniform(*PITCHES[group.pitch])
    glide = {"rising tone": (1.0, 1.0), "falling tone": (2.0, -1.0)}.get(
        group.kind, (1.0, 0.0)
    )  # pitch at the start, and its change
    phase = 2 * np.pi * pitch * (glide[0] * time + glide[1] * time**2 / (2 * seconds))
    if group.kind == "noise burst":
        spectrum = np.fft.rfft(random.standard_normal(len(time)))
        frequency = np.fft.rfftfreq(len(time), 1 / SAMPLE_RATE)
        spectrum[(frequency < 0.7 * pitch) | (frequency > 1.4 * pitch)] = 0
        wave = np.fft.irfft(spectrum, len(time))
        wave /= np.abs(wave).max()
    else:
        wave = 0.5 * np.sign(np.sin(phase)) if group.kind == "buzz" else np.sin(phase)
    return wave * np.minimum(1, np.minimum(time, time[::-1]) / EDGE)
