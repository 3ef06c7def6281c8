"""The benchmark of starts: a run of one step more at a time, by `launch train`."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import yaml

from configs.errors import EarwitnessError
from configs.run.events import FirstStep
from configs.run.folder import RunDir
from tools.bench.report import ROOT, Figures, environment
from tools.sandbox.sounds import write_clips
from tools.sandbox.whisper import make_whisper

CLIPS = 64


def make(work: Path, backend: str, procs: int, sizes: dict[str, int]) -> Path:
    """Make a model, shards and their index in a folder; returns the config of a run that has not begun."""
    table = write_clips(work / "clips", CLIPS, 0, seed=0)
    captions = [line.split(",", 1)[1] for line in table.read_text(encoding="utf-8").splitlines()[1:]]
    make_whisper(work / "model", captions, seconds=4, **sizes)
    config = work / "config.yaml"
    sections = {
        "run": {"name": "bench", "dir": str(work / "run")},
        "model": {"name_or_path": str(work / "model")},
        "data": {
            "sources": [{"name": "sounds", "shards": [f"{work}/shards/*.tar"]}],
            "index_dir": str(work / "index"),
        },
        "batch": {"global_size": 2 * procs},
        "optim": {"max_steps": 1},
        "engine": {"backend": backend, "dtype": "fp32"},
    }
    config.write_text(yaml.safe_dump(sections), encoding="utf-8")
    _run("tools.pack", table, work / "shards")
    _run("tools.index", config)
    return config


def measure(config: Path, procs: int, step: int) -> Figures:
    """Start the run for one step, the last of `step`; returns seconds by part, and all of them (total)."""
    began = time.time()
    _run("launch", "train", config, f"optim.max_steps={step}", "--procs", procs)
    (first_step,) = (
        event for event in RunDir(config.parent / "run").ledger.read().of(FirstStep) if event.step == step
    )
    of_rank = sum(first_step.seconds.values())
    launch = first_step.time - of_rank - began
    return {"launch": launch, **first_step.seconds, "total": launch + of_rank}


def _run(*arguments: object) -> None:
    """Run `python -m ...`. Raises EarwitnessError if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise EarwitnessError(f"{arguments[0]} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
