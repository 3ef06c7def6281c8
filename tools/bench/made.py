"""What steps are measured on: a Whisper with random weights, and clips of the reference's mix of lengths."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import yaml

from tools.bench.report import run_module, say
from tools.sandbox.whisper import make_whisper

WINDOW_SECONDS = 30
SHARES = {
    "audioset": 0.57,
    "music": 0.08,
    "freesound": 0.12,
    "speech": 0.06,
    "events": 0.10,
    "effects": 0.06,
    "clips": 0.02,
}
"""Parts of the reference's 3.1 million clips, by source (of 1.01)."""
WORDS = [
    "two",
    "one",
    "three",
    "four",
    "short",
    "long",
    "high",
    "low",
    "middle",
    "beeps",
    "buzz",
    "rising",
    "falling",
    "tone",
    "noise",
    "burst",
    "then",
    "after",
    "a",
    "pause",
    "of",
    "silence,",
    "while",
    "somebody",
    "says:",
    '"hello";',
    "music",
    "fades",
    "(slowly)",
    "and",
    "rain",
    "starts",
    "to",
    "fall",
    "on",
    "a",
    "tin",
    "roof",
    "near",
    "the",
    "station.",
]
FEWEST_WORDS, MOST_WORDS = 48, 80
"""Of a caption: 60 to 100 tokens."""


class Preset(StrEnum):
    """Published Whispers, by size; `sandbox` is that of the tests."""

    turbo = "turbo"
    small = "small"
    base = "base"
    tiny = "tiny"
    sandbox = "sandbox"

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes, as `make_whisper` takes them."""
        return {
            Preset.turbo: {
                "width": 1280,
                "layers": 32,
                "decoder_layers": 4,
                "mels": 128,
                "vocabulary": 51_866,
            },
            Preset.small: {"width": 768, "layers": 12, "vocabulary": 51_865},
            Preset.base: {"width": 512, "layers": 6, "vocabulary": 51_865},
            Preset.tiny: {"width": 384, "layers": 4, "vocabulary": 51_865},
            Preset.sandbox: {"width": 64, "layers": 2, "vocabulary": 400},
        }[self]


@contextmanager
def prepared(folder: Path, preset: Preset, clips: int) -> Iterator[Path]:
    """A temporary folder with a model, shards and their index; gives the config of a run on them."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=folder, ignore_cleanup_errors=True) as name:
        work = Path(name).resolve()
        say(f"{clips} clips and a Whisper: {preset.value}")
        table = _write_clips(work / "clips", clips)
        with table.open(newline="", encoding="utf-8") as file:
            captions = [row["caption"] for row in csv.DictReader(file)]
        make_whisper(work / "model", captions, seconds=WINDOW_SECONDS, positions=448, **preset.sizes)
        config = work / "config.yaml"
        sections = {
            "run": {"name": "bench", "dir": str(work / "run")},
            "model": {"name_or_path": str(work / "model")},
            "data": {
                "sources": [{"name": "made", "shards": [f"{work}/shards/*.tar"]}],
                "index_dir": str(work / "index"),
            },
            "optim": {"lr": 1e-5, "max_steps": 10**6},
            "evaluate": {"every_steps": 10**6, "captions": 0},
            "checkpoint": {"every_steps": 10**6},
        }
        config.write_text(yaml.safe_dump(sections), encoding="utf-8")
        run_module("tools.pack", table, work / "shards", "--shard-mb", 16)
        run_module("tools.index", config)
        yield config


def _write_clips(folder: Path, clips: int) -> Path:
    """Write clips as FLAC, half of them 44.1 kHz stereo and half 16 kHz mono, in the order of their sources,
    and a CSV; returns the CSV."""
    folder.mkdir(parents=True)
    total = sum(SHARES.values())
    ends = [round(clips * part / total) for part in np.cumsum([0.0, *SHARES.values()])]
    sources = [
        source for source, (begin, end) in zip(SHARES, pairwise(ends), strict=True) for _ in range(begin, end)
    ]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        rows = list(pool.map(_write_clip, [folder] * clips, sources, range(clips), chunksize=8))
    table = folder / "clips.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file", "caption"])
        writer.writeheader()
        writer.writerows(rows)
    return table


def _write_clip(folder: Path, source: str, number: int) -> dict[str, str]:
    """Write a clip; returns its row of the CSV."""
    random = np.random.default_rng([1, number])
    rate, channels = ((44_100, 2), (16_000, 1))[number % 2]
    sound = _sound(random, int(rate * _draw_seconds(random, source)), rate)
    file = f"{number:06d}.flac"
    soundfile.write(folder / file, np.repeat(sound[:, None], channels, axis=1), rate)
    words = random.choice(WORDS, random.integers(FEWEST_WORDS, MOST_WORDS + 1))
    return {"file": file, "caption": " ".join(words).capitalize() + "."}


def _draw_seconds(random: np.random.Generator, source: str) -> float:
    """Length of a clip as the reference's sources have them, in seconds."""
    match source:
        case "audioset":
            seconds = 10.0
        case "music":
            seconds = 30.0
        case "freesound":
            seconds = random.lognormal(1.8, 1.1)
        case "speech":
            seconds = random.normal(8, 2)
        case "clips":
            seconds = random.normal(4, 1)
        case _:
            seconds = random.uniform(2, 30)
    return float(np.clip(seconds, 0.5, WINDOW_SECONDS))


def _sound(random: np.random.Generator, length: int, rate: int) -> npt.NDArray[np.float64]:
    """(length,) of tones that swell, with a little noise: FLAC packs them about as well as music."""
    time = np.arange(length) / rate
    wave = random.standard_normal(length) * 0.01
    for _ in range(4):
        loudness, pitch = random.uniform(0.05, 0.2), random.uniform(80, 4000)
        wave += loudness * np.sin(2 * np.pi * pitch * time)
    return wave * (0.6 + 0.4 * np.sin(2 * np.pi * random.uniform(0.2, 2) * time))
