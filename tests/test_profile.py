"""`launch profile` gets a trace of three steps from a run at work."""

from __future__ import annotations

import gzip
import json
import threading
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from configs.run.events import TrainingBegan, TrainingEnded
from configs.run.folder import RunDir
from launch.profile import profile
from trainer.profiling import STEPS, StepProfiler


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of one rank that is training."""
    run = RunDir(tmp_path / "run")
    run.ledger.folder.mkdir(parents=True)
    began = TrainingBegan(attempt=0, step=0, total_steps=1000, global_size=8, ranks=1, device="cpu")
    run.ledger.record(began)
    return run


def test_the_next_three_steps_are_traced_and_shown(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    over = threading.Event()

    def train() -> None:
        profiler, number = StepProfiler(run.profiles, 0, torch.device("cpu")), 0
        weights = torch.ones(64, 64)
        while not over.is_set():
            with torch.profiler.record_function("one step"):
                weights @ weights
            number += 1
            profiler.step(number)
        profiler.close()

    run.profiles.ask(0)  # so that the first look finds it
    training = threading.Thread(target=train)
    training.start()
    try:
        profile(run, rank=0, minutes=1)
    finally:
        over.set()
        training.join()
    said = capsys.readouterr().out
    (trace,) = run.profiles.traces(0)
    assert "aten::mm" in said and str(trace) in said and "ui.perfetto.dev" in said
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name") == "one step" and event.get("ph") == "X"]
    assert len(steps) == STEPS
    assert not run.profiles.is_asked_for(0)


def test_what_cannot_be_traced_is_said(run: RunDir) -> None:
    with pytest.raises(ConfigError, match="--rank 3: the attempt has 1 ranks"):
        profile(run, rank=3, minutes=1)
    run.ledger.record(TrainingEnded(attempt=0, step=5, outcome="finished"))
    with pytest.raises(ConfigError, match="no attempt is training now"):
        profile(run, rank=0, minutes=1)
    assert not run.profiles.is_asked_for(0)
