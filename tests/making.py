"""What tests train on: small Whispers with a tokenizer of their own, and sounds with captions, all made here
and seeded."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from configs.run.folder import RunDir
from configs.schema import Source
from data.index import index_shard
from data.sources import expand
from tools.sandbox.whisper import make_whisper

ROOT = Path(__file__).parents[1]
KINDS = ("beep", "buzz", "hiss")
PITCHES = {"low": 200.0, "middle": 700.0, "high": 2000.0}
WINDOW_SECONDS = 2


def caption_of(number: int) -> str:
    """A true caption of clip `number`, with the quotes and colons that Whisper's generation config bans."""
    kind, pitch, count = KINDS[number % 3], list(PITCHES)[number // 3 % 3], 1 + number // 9 % 3
    return f'Heard: {count} {pitch} "{kind}" sounds.' if number % 2 else f"A {pitch} {kind}, {count} times."


def sound_of(number: int, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    """Clip `number`: (n, channels) float32, 0.5 to 1.4 s."""
    random = np.random.default_rng(number)
    kind, pitch, count = KINDS[number % 3], list(PITCHES.values())[number // 3 % 3], 1 + number // 9 % 3
    time = np.arange(int(rate * (0.5 + 0.1 * (number % 10)))) / rate
    wave = {
        "beep": np.sin(2 * np.pi * pitch * time),
        "buzz": np.sign(np.sin(2 * np.pi * pitch * time)) * 0.5,
        "hiss": random.standard_normal(len(time)) * 0.2,
    }[kind]
    wave *= (time * count * 2 / time[-1]) % 1 < 0.6
    wave += random.standard_normal(len(time)) * 0.003
    return np.repeat((wave * 0.5).astype(np.float32)[:, None], channels, axis=1)


def make_clips(
    folder: Path, numbers: range, endings: tuple[str, ...] = ("flac", "wav", "ogg", "mp3")
) -> Path:
    """Write clips of several formats, rates and channels, and a CSV; returns the CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in numbers:
        file = f"clip{number:04d}.{endings[number % len(endings)]}"
        rate = (16_000, 44_100, 8_000)[number % 3]
        soundfile.write(folder / file, sound_of(number, rate, channels=1 + number % 2), rate)
        rows.append({"file": file, "caption": caption_of(number), "licence": "CC0"})
    table = folder / "clips.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table


def make_model(folder: Path, **shape: int) -> Path:
    """A small Whisper for these clips, without weights."""
    return make_whisper(folder, map(caption_of, range(200)), **shape)


def index_in_full(folder: Path, shards: str) -> None:
    """Let the runs of `config_values` with this folder and these shards know the lengths of clips, so that
    ranks are evened out."""
    for shard in expand(Source(name="sounds", shards=[shards])):
        index_shard(shard, folder / "index", full=True)


def config_values(
    name: str, folder: Path, model: Path, shards: str, **sections: dict[str, object]
) -> dict[str, dict[str, object]]:
    """Values of a small config; `sections` are merged over it."""
    source = {"name": "sounds", "shards": [shards], "validation": 0.15}
    values: dict[str, dict[str, object]] = {
        "run": {"name": name, "dir": str(folder / name), "seed": 7},
        "model": {"name_or_path": str(model)},
        "data": {"sources": [source], "index_dir": str(folder / "index"), "audit": True, "threads": 1},
        "batch": {"global_size": 8, "micro_seconds": 4},
        "optim": {"lr": 1e-3, "max_steps": 4, "warmup_fraction": 0.0},
        "evaluate": {"captions": 2, "scored": 0, "max_samples": 8},
        "monitor": {"every_steps": 1},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return values


def run_program(
    *arguments: object, env: dict[str, str] | None = None, cwd: Path = ROOT, timeout: float = 1200
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` of this checkout, from its root unless told otherwise."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )


@dataclass
class Taken:
    """What the audit says of a step in an attempt: keys by lane, samples that could not be used, ranks that
    have reported."""

    by_lane: dict[int, str] = field(default_factory=dict)
    rejected: list[str] = field(default_factory=list)
    ranks: int = 0

    @property
    def keys(self) -> list[str]:
        """In the order of lanes."""
        return [self.by_lane[lane] for lane in sorted(self.by_lane)]


def audit_of_attempts(run: Path) -> dict[tuple[int, int], Taken]:
    """What was taken, by attempt and step."""
    found: dict[tuple[int, int], Taken] = defaultdict(Taken)
    for line in sorted(RunDir(run).audit.read().values, key=lambda line: line["rank"]):
        taken = found[line["attempt"], line["step"]]
        by_lane = dict(zip(line["lanes"], line["keys"], strict=True))
        assert not by_lane.keys() & taken.by_lane.keys(), "a sample is computed by one rank"
        taken.by_lane |= by_lane
        taken.rejected += line.get("rejected", [])
        taken.ranks += 1
    return found


def audit(run: Path) -> dict[int, list[str]]:
    """Keys by step, in the order of lanes; what two attempts have taken comes twice."""
    steps: dict[int, list[str]] = defaultdict(list)
    for (_, step), taken in sorted(audit_of_attempts(run).items(), key=lambda item: item[0]):
        steps[step] += taken.keys
    return dict(steps)
