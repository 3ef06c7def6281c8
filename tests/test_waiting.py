"""A run that waits for its samples heeds a stop, and is no hang as long as bytes come."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.run.events import CheckpointSaved, TrainingEnded
from data.loader import Step
from data.retry import STATS
from slurm.signals import StopFlag
from tests.forks import Course, Kill, Launcher
from tests.making import ROOT, config_values
from trainer.loop import fetch

STALL = 90.0
"""Seconds that the read takes for which the run waits: longer than everything else together."""
NOTHING = Step(3, [], [], 0.0)


@dataclass
class Slow:
    """Takes the place of a loader: a slice of waiting for each entry, in which so many bytes come."""

    slices: list[int]
    stop: StopFlag
    stopped_after: int = 1000

    def ready(self, seconds: float) -> bool:
        assert seconds <= 1
        if not self.slices:
            return True
        STATS["local"] += self.slices.pop(0)
        self.stopped_after -= 1
        if self.stopped_after == 0:
            self.stop.signum = signal.SIGTERM
        return False

    def __next__(self) -> Step:
        return Step(3, [], [], 12.0)


def test_bytes_that_come_are_signs_of_life_and_waiting_alone_is_none() -> None:
    signs: list[int] = []
    stop = StopFlag()
    step, error = fetch(Slow([0, 5, 0, 0, 7, 1, 0], stop), NOTHING, stop, lambda: signs.append(1))
    assert (step.waited, error) == (12.0, None)
    assert len(signs) == 1 + 3, "one at the beginning, and one for each slice in which bytes came"


def test_who_is_asked_to_stop_waits_no_longer() -> None:
    stop = StopFlag()
    loader = Slow([5] * 20, stop, stopped_after=3)
    step, error = fetch(loader, NOTHING, stop, lambda: None)
    assert len(loader.slices) == 17 and error is None
    assert step is NOTHING


WATCHED = """
import sys, time
from pathlib import Path
from configs.run.goodput import Phase
from slurm import watchdog
watchdog.TICK, watchdog.QUIET, watchdog.GATHER, watchdog.ALIVE_EVERY = 0.05, 0.5, 0.5, 0.5
rank, what = int(sys.argv[2]), sys.argv[3]
watch = watchdog.Watchdog(Path(sys.argv[1]), rank, ["n1", "n2"], seconds=1.5, report=print)
for _ in range(2):  # so that the phases are known
    watch(Phase.DATA_WAIT, 7)
    watch.arrive()
    watch.arrive()
if what != "arrived":
    watch(Phase.DATA_WAIT, 8)
until = time.monotonic() + float(sys.argv[4])
while time.monotonic() < until:
    time.sleep(0.1)
    if what == "reads":
        watch(Phase.DATA_WAIT, 8)
watch.close()
"""


@pytest.mark.parametrize(("other", "seconds", "hangs"), [("reads", 4, False), ("stuck", 60, True)])
def test_who_waits_for_a_rank_that_reads_slowly_is_patient(
    tmp_path: Path, other: str, seconds: int, hangs: bool
) -> None:
    """Longer than its own limit, as long as bytes come there; not if nothing comes."""
    ranks = [
        subprocess.Popen([sys.executable, "-c", WATCHED, tmp_path, str(rank), what, str(seconds)], cwd=ROOT)
        for rank, what in enumerate(["arrived", other])
    ]
    assert [process.wait(60) != 0 for process in ranks] == [hangs, hangs]


@pytest.mark.parametrize(("reads", "step"), [(1, 0), (60, 1)], ids=["in the evaluation", "in training"])
def test_a_stop_while_a_read_stalls_saves_at_once(
    tmp_path: Path, model: Path, shards: str, launch: Launcher, reads: int, step: int
) -> None:
    """Rank 1 alone is asked, by TERM, a second after one of its reads has begun to stall. All ranks save what
    they have taken, and leave; the step whose samples did not come is taken later."""
    course = Course(tmp_path, model, shards, launch)
    values = config_values(
        "stalled",
        tmp_path,
        model,
        shards,
        engine={"backend": "fsdp2", "dtype": "fp32"},
        data={"shuffle_window": 1},  # some reads for each step
        optim={"max_steps": 30},
        evaluate={"every_steps": 1000, "captions": 0, "max_samples": 8},
        checkpoint={"every_steps": 1000},
    )
    stalled = Kill("data.storage:read", nth=reads, rank=1, delay=1.0, signum=signal.SIGTERM, stall=STALL)
    began = time.monotonic()
    done = launch(values, procs=2, kill=stalled)
    assert time.monotonic() - began < STALL, "the read was waited for"
    assert done.returncode == 85, done.stderr
    run = course.run("stalled")
    (stopped,) = run.ledger.read().of(TrainingEnded)
    assert step <= stopped.step < 30
    saved = [(event.step, event.reason) for event in run.ledger.read().of(CheckpointSaved)]
    assert saved == ([(stopped.step, "stop")] if step else [])
