"""The demo: its clips are what their captions say and what is held out is new, and the whole of it learns."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from configs.run.folder import PACKAGES
from tests.making import ROOT
from tools.sandbox.sounds import LONGEST, PAUSE_OF_GROUPS, SAMPLE_RATE, write_clips

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, np.ndarray]]:
    """(split, caption, waveform) of some clips."""
    path = write_clips(tmp_path_factory.mktemp("clips") / "clips", training=300, held_out=60, seed=3)
    return [
        (row["split"], row["caption"], soundfile.read(path.parent / row["file"])[0])
        for row in csv.DictReader(path.open(encoding="utf-8"))
    ]


def test_no_caption_that_is_held_out_is_trained_on(table) -> None:
    training = {caption for split, caption, _ in table if split == "train"}
    held_out = {caption for split, caption, _ in table if split == "held-out"}
    assert len(table) == 360 and len(held_out) > 30 and not training & held_out


def test_captions_tell_the_truth(table) -> None:
    """Number and length of the sounds, and the pitch of beeps, measured in the waveform."""
    for _, caption, waveform in table:
        assert len(waveform) <= LONGEST * SAMPLE_RATE
        loud = np.convolve(np.abs(waveform) > 0.03, np.ones(320), "same") > 0  # 20 ms hold sounds together
        starts, ends = (
            np.flatnonzero(np.diff(loud.astype(int)) == 1),
            np.flatnonzero(np.diff(loud.astype(int)) == -1),
        )
        groups = [
            re.fullmatch(r"(\w+) (\w+) (\w+) (.+?)(?:es|s)?", text).groups()
            for text in caption.lower().rstrip(".").split(" then ")
        ]
        expected = [group for group in groups for _ in range(NUMBERS[group[0]])]
        assert len(starts) == len(ends) == len(expected), caption
        pauses = (starts[1:] - ends[:-1]) / SAMPLE_RATE
        assert sum(pauses > PAUSE_OF_GROUPS - 0.1) == len(groups) - 1, caption
        for start, end, (_, length, pitch, kind) in zip(starts, ends, expected, strict=True):
            assert ((end - start) / SAMPLE_RATE > 0.35) == (length == "long"), caption
            if kind == "beep":
                spectrum = np.abs(np.fft.rfft(waveform[start:end]))
                peak = spectrum.argmax() * SAMPLE_RATE / (end - start)
                assert {
                    "low": 200 <= peak <= 310,
                    "middle": 590 <= peak <= 910,
                    "high": 1790 <= peak <= 2610,
                }[pitch], (caption, peak)


def test_the_same_seed_makes_the_same_clips(table, tmp_path: Path) -> None:
    path = write_clips(tmp_path / "clips", training=5, held_out=2, seed=3)
    again = [
        soundfile.read(path.parent / row["file"])[0] for row in csv.DictReader(path.open(encoding="utf-8"))
    ]
    first = [clip for split, _, clip in table if split == "train"][:5] + [
        clip for split, _, clip in table if split == "held-out"
    ][:2]
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))


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
