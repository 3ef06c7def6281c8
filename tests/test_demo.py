"""The demo: its clips are what their captions say and what is held out is new, and the whole of it learns."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile

from configs.run.folder import PACKAGES
from tests.making import ROOT
from tools.sandbox.sounds import LONGEST, NUMBERS, PAUSE_OF_GROUPS, PITCHES, SAMPLE_RATE, write_clips


class Clip(NamedTuple):
    split: str
    caption: str
    waveform: np.ndarray


def read(table: Path) -> list[Clip]:
    """The clips of a CSV that write_clips has written."""
    with table.open(encoding="utf-8") as file:
        return [
            Clip(row["split"], row["caption"], soundfile.read(table.parent / row["file"])[0])
            for row in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("clips") / "clips"
    return read(write_clips(folder, training=300, held_out=60, seed=3))


def test_no_caption_that_is_held_out_is_trained_on(table: list[Clip]) -> None:
    training = {clip.caption for clip in table if clip.split == "train"}
    held_out = {clip.caption for clip in table if clip.split == "held-out"}
    assert len(table) == 360 and len(held_out) > 30 and not training & held_out


def test_captions_tell_the_truth(table: list[Clip]) -> None:
    """Number and length of the sounds, and the pitch of beeps, measured in the waveform."""
    for _, caption, waveform in table:
        assert len(waveform) <= LONGEST * SAMPLE_RATE
        loud = np.convolve(np.abs(waveform) > 0.03, np.ones(320), "same") > 0  # 20 ms hold sounds together
        changes = np.diff(loud.astype(int))
        starts, ends = np.flatnonzero(changes == 1), np.flatnonzero(changes == -1)
        groups = [
            re.fullmatch(r"(\w+) (\w+) (\w+) (.+?)(?:es|s)?", text).groups()
            for text in caption.lower().rstrip(".").split(" then ")
        ]
        expected = [group for group in groups for _ in range(1 + NUMBERS.index(group[0]))]
        assert len(starts) == len(ends) == len(expected), caption
        pauses = (starts[1:] - ends[:-1]) / SAMPLE_RATE
        assert sum(pauses > PAUSE_OF_GROUPS - 0.1) == len(groups) - 1, caption
        for start, end, (_, length, pitch, kind) in zip(starts, ends, expected, strict=True):
            assert ((end - start) / SAMPLE_RATE > 0.35) == (length == "long"), caption
            if kind == "beep":
                spectrum = np.abs(np.fft.rfft(waveform[start:end]))
                peak = spectrum.argmax() * SAMPLE_RATE / (end - start)
                lowest, highest = PITCHES[pitch]
                assert lowest - 10 <= peak <= highest + 10, (caption, peak)


def test_the_same_seed_makes_the_same_clips(table: list[Clip], tmp_path: Path) -> None:
    path = write_clips(tmp_path / "clips", training=5, held_out=2, seed=3)
    again = [clip.waveform for clip in read(path)]
    training = [clip.waveform for clip in table if clip.split == "train"]
    held_out = [clip.waveform for clip in table if clip.split == "held-out"]
    first = training[:5] + held_out[:2]
    assert all(np.array_equal(before, after) for before, after in zip(first, again, strict=True))


@pytest.mark.slow
def test_the_demo_learns(tmp_path: Path) -> None:
    for package in PACKAGES:  # a copy, because the demo begins with an empty demo/ and runs/demo
        shutil.copytree(ROOT / package, tmp_path / package)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "resumes at step" in done.stdout and "1 x cpu, attempt 1" in done.stdout
    last = re.fullmatch(r"held-out captions right: (\d+\.\d) %", done.stdout.strip().splitlines()[-1])
    assert last and float(last[1]) >= 80
    assert (tmp_path / "demo/captioner/model.safetensors").exists()
